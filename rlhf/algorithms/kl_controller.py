"""The weight of the KL to the reference from step to step: fixed, or steered towards a target."""

from __future__ import annotations

from dataclasses import dataclass, replace

ERROR_LIMIT = 0.2


@dataclass(frozen=True)
class FixedKl:
    """A coefficient that stays."""

    coef: float

    def update(self, kl: float, samples: int) -> FixedKl:
        """Return itself."""
        return self


@dataclass(frozen=True)
class AdaptiveKl:
    """A coefficient that steers the mean sequence KL, in nats, to `target` (Ziegler et al. 2019, section 2.2).

    e = clip(kl / target - 1, -0.2, 0.2), then coef *= 1 + e * samples / horizon;
    a step counts as one horizon at most, so that the coefficient stays above 0.
    """

    coef: float
    target: float
    horizon: int

    def update(self, kl: float, samples: int) -> AdaptiveKl:
        """Return the controller after a step of `samples` sequences whose mean KL was `kl`."""
        error = min(max(kl / self.target - 1, -ERROR_LIMIT), ERROR_LIMIT)
        return replace(self, coef=self.coef * (1 + error * min(samples / self.horizon, 1)))


def kl_controller(coef: float, target: float | None, horizon: int) -> FixedKl | AdaptiveKl:
    """Return an adaptive controller that starts at `coef`, or a fixed one where there is no target."""
    return FixedKl(coef) if target is None else AdaptiveKl(coef, target, horizon)
