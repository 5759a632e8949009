"""What a comparison came to: the numbers, by method and by pair. What went in is in `rlhf.report.samples`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from pydantic import BeforeValidator

from rlhf.recipe.base import Budget

Metric = Literal["gold", "reward", "kl", "length", "retention"]
METRICS: tuple[Metric, ...] = ("gold", "reward", "kl", "length")
"""What is measured of each response; `retention` is of other chats."""

# With fewer prompts a bootstrap interval is too narrow to call anything by (Efron & Tibshirani 1993, chapter 14).
FEWEST_PROMPTS = 10


@dataclass(frozen=True)
class Cost:
    """What training one policy took; `accelerator_seconds` is seconds times GPUs, or times CPU cores without."""

    gradient_tokens: float
    generated_tokens: float
    seconds: float
    accelerator_seconds: float

    def share(self, budget: Budget) -> float:
        """Return the share of the budget that this is, by the limit it comes nearest to."""
        limits = (
            (self.gradient_tokens, budget.gradient_tokens),
            (self.generated_tokens, budget.generated_tokens),
            (self.accelerator_seconds, budget.accelerator_seconds),
        )
        return max((used / limit for used, limit in limits if limit is not None), default=0.0)


def _end(infinite: float) -> BeforeValidator:
    return BeforeValidator(lambda value: infinite if value is None else value)


class Interval(NamedTuple):
    """A confidence interval; unbounded (-inf, inf) where the data cannot say, as with a single prompt."""

    low: Annotated[float, _end(-math.inf)]
    high: Annotated[float, _end(math.inf)]

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0

    @property
    def bounded(self) -> bool:
        """Whether both ends are known."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __str__(self) -> str:
        return f"[{show(self.low)}, {show(self.high)}]" if self.bounded else "[unknown]"


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` prompts (and over runs), its interval and its two-sided p-value against zero."""

    value: float
    ci: Interval
    n: int
    p_value: float


@dataclass(frozen=True)
class FrontierPoint:
    """One policy of one run on the held-out prompts; `step` is None for the finished one.

    Means over prompts with standard errors (None for a single prompt); `kl` in nats a response, `length` in tokens.
    """

    method: str
    run: str
    step: int | None
    gold: float
    gold_se: float | None
    reward: float | None
    reward_se: float | None
    kl: float
    kl_se: float | None
    length: float


@dataclass(frozen=True)
class RunResult:
    """The means of one run of a method."""

    name: str
    gold: float
    reward: float | None
    kl: float
    length: float


@dataclass(frozen=True)
class CandidateResult:
    """What was measured of one method: means over its runs and prompts, every run and every prompt weighing the same.

    `length` is in tokens and `characters` in characters; `win_rate` is against the baseline by gold (a tie is half a
    win); `truncated` is the share of responses cut at the token limit, `distinct` the number of different responses
    over all responses, `entropy` in nats a token; `cost` is the mean of its runs'.
    """

    name: str
    kind: str
    runs: tuple[RunResult, ...]
    gold: float
    gold_ci: Interval
    reward: float | None
    reward_ci: Interval | None
    kl: float
    kl_ci: Interval
    length: float
    length_ci: Interval
    win_rate: float
    win_rate_ci: Interval
    truncated: float
    distinct: float
    entropy: float
    characters: float
    preference_accuracy: float | None
    cost: Cost | None
    retention: Retention | None = None


@dataclass(frozen=True)
class PairedDifference:
    """Mean of candidate - baseline over the same `n` prompts. `baseline` is whom it is compared with here.

    `p_corrected` is `p_value` after Holm's correction for all pairs of this metric.
    """

    candidate: str
    baseline: str
    metric: Metric
    difference: float
    ci: Interval
    n: int
    p_value: float
    p_corrected: float
    level: float

    @property
    def clear(self) -> bool:
        """Whether it is told from zero: by the corrected p-value and the interval, on enough prompts to trust them."""
        told = self.p_corrected <= 1 - self.level + 1e-12
        return self.n >= FEWEST_PROMPTS and told and (self.ci.above_zero or self.ci.below_zero)

    def reversed(self) -> PairedDifference:
        """Return the same comparison seen from the other side."""
        rest = (self.n, self.p_value, self.p_corrected, self.level)
        return PairedDifference(self.baseline, self.candidate, self.metric, -self.difference, -self.ci, *rest)

    def __str__(self) -> str:
        return f"{show(self.difference, sign=True)} {self.ci}"


@dataclass(frozen=True)
class Retention:
    """How a method predicts the `chats` of the retention set: mean -log p of the assistant's tokens, nats a token.

    `difference` is to the baseline, chat by chat, above zero where the method has forgotten; None for the baseline.
    """

    nll: float
    nll_ci: Interval
    difference: PairedDifference | None
    chats: int
    tokens: int


@dataclass(frozen=True)
class WinRate:
    """How often `candidate` beats `baseline` by gold on the same prompt, 0..1, a tie counting one half.

    `length_controlled` is what it would be were both answers of the same length.
    """

    candidate: str
    baseline: str
    win_rate: float
    win_rate_ci: Interval
    standard_error: float
    wins: int
    losses: int
    draws: int
    length_controlled: float

    def reversed(self) -> WinRate:
        """Return the same meetings seen from the other side."""
        turned = Interval(1 - self.win_rate_ci.high, 1 - self.win_rate_ci.low)
        counts = (self.losses, self.wins, self.draws, 1 - self.length_controlled)
        return WinRate(self.baseline, self.candidate, 1 - self.win_rate, turned, self.standard_error, *counts)


@dataclass(frozen=True)
class Comparison:
    """The outcome, by method. `differences` has each pair once per metric, `wins` each pair once.

    `samples` counts the responses of one run; `reward_accuracy` is the reward model's on held-out pairs.
    """

    baseline: str
    candidates: tuple[CandidateResult, ...]
    differences: tuple[PairedDifference, ...]
    wins: tuple[WinRate, ...]
    frontier: tuple[FrontierPoint, ...]
    budget: Budget | None
    reward_accuracy: float | None
    prompts: int
    samples: int
    seed: int
    bootstrap_samples: int
    level: float
    tie_margin: float

    @property
    def ranked(self) -> list[CandidateResult]:
        """The methods, best gold first."""
        return sorted(self.candidates, key=lambda item: -item.gold)

    @property
    def metrics(self) -> list[Metric]:
        """What was measured: all metrics, or all but the reward."""
        return [name for name in METRICS if name != "reward" or self.candidates[0].reward is not None]

    @property
    def runs(self) -> int:
        """The number of runs of the method that has most."""
        return max(len(item.runs) for item in self.candidates)

    def candidate(self, name: str) -> CandidateResult:
        """Return the result of the method of that name."""
        return next(item for item in self.candidates if item.name == name)

    def difference(self, candidate: str, other: str, metric: Metric) -> PairedDifference:
        """Return candidate - other in one metric, whichever way round it is stored."""
        for item in self.differences:
            if item.metric == metric and (item.candidate, item.baseline) == (candidate, other):
                return item
            if item.metric == metric and (item.candidate, item.baseline) == (other, candidate):
                return item.reversed()
        raise KeyError(f"{candidate} was not compared with {other} by {metric}")

    def win(self, candidate: str, other: str) -> WinRate:
        """Return how often `candidate` beats `other`, whichever way round it is stored."""
        for item in self.wins:
            if (item.candidate, item.baseline) == (candidate, other):
                return item
            if (item.candidate, item.baseline) == (other, candidate):
                return item.reversed()
        raise KeyError(f"{candidate} did not meet {other}")


def show(value: float, sign: bool = False) -> str:
    """Write a number with as many decimals as its size deserves: 0.70, 12.3, 456; `sign` writes a plus too."""
    if not math.isfinite(value):
        return "unknown"
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.01 else 3
    rounded = round(value, decimals)
    if rounded == 0:
        return "0.00"
    return f"{rounded:{'+' if sign else ''}.{decimals}f}"
