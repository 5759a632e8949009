"""What a comparison is made of, from the samples that went in to the numbers that came out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Metric = Literal["gold", "reward", "kl", "length"]
METRICS: tuple[Metric, ...] = ("gold", "reward", "kl", "length")

# With fewer prompts a bootstrap interval is too narrow to call anything by (Efron & Tibshirani 1993, chapter 14).
FEWEST_PROMPTS = 10


@dataclass(frozen=True)
class Sample:
    """One scored response. `kl` is its sequence log(policy/reference) in nats, `tokens` its length."""

    prompt_id: str
    prompt: str
    response: str
    gold: float
    reward: float
    kl: float
    tokens: int
    finish_reason: str


@dataclass(frozen=True)
class CandidateSamples:
    """All samples of one candidate; every candidate has the same prompt ids in the same order."""

    name: str
    kind: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Interval:
    """A confidence interval; unbounded (-inf, inf) where the data cannot say, as with a single prompt."""

    low: float
    high: float

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high < 0

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __str__(self) -> str:
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return "[unknown]"
        return f"[{show(self.low)}, {show(self.high)}]"


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` prompts with its interval."""

    value: float
    ci: Interval
    n: int


@dataclass(frozen=True)
class CandidateResult:
    """What was measured of one candidate. All means weigh every prompt the same.

    `length` is in tokens, `win_rate` against the baseline by gold (a tie is half a win), `truncated` the share
    of responses cut at the token limit, `distinct` the number of different responses over all responses.
    """

    name: str
    kind: str
    gold: float
    gold_ci: Interval
    reward: float
    reward_ci: Interval
    kl: float
    kl_ci: Interval
    length: float
    length_ci: Interval
    win_rate: float
    win_rate_ci: Interval
    truncated: float
    distinct: float


@dataclass(frozen=True)
class PairedDifference:
    """Mean of candidate - baseline over the same `n` prompts. `baseline` is whom it is compared with here."""

    candidate: str
    baseline: str
    metric: Metric
    difference: float
    ci: Interval
    n: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero, on enough prompts to trust it."""
        return self.n >= FEWEST_PROMPTS and (self.ci.above_zero or self.ci.below_zero)

    def reversed(self) -> PairedDifference:
        """Return the same comparison seen from the other side."""
        return PairedDifference(self.baseline, self.candidate, self.metric, -self.difference, -self.ci, self.n)

    def __str__(self) -> str:
        return f"{show(self.difference, sign=True)} {self.ci}"


@dataclass(frozen=True)
class Comparison:
    """The outcome. `differences` has each pair of candidates once per metric."""

    baseline: str
    candidates: tuple[CandidateResult, ...]
    differences: tuple[PairedDifference, ...]
    prompts: int
    samples: int
    seed: int
    bootstrap_samples: int
    level: float
    tie_margin: float

    def candidate(self, name: str) -> CandidateResult:
        """Return the result of the candidate of that name."""
        return next(item for item in self.candidates if item.name == name)

    def difference(self, candidate: str, other: str, metric: Metric) -> PairedDifference:
        """Return candidate - other in one metric, whichever way round it is stored."""
        for item in self.differences:
            if item.metric == metric and (item.candidate, item.baseline) == (candidate, other):
                return item
            if item.metric == metric and (item.candidate, item.baseline) == (other, candidate):
                return item.reversed()
        raise KeyError(f"{candidate} was not compared with {other} by {metric}")


def show(value: float, sign: bool = False) -> str:
    """Write a number with as many decimals as its size deserves: 0.70, 12.3, 456; `sign` writes a plus too."""
    if not math.isfinite(value):
        return "unknown"
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 0.01 else 3
    rounded = round(value, decimals)
    if rounded == 0:
        return "0.00"
    return f"{rounded:{'+' if sign else ''}.{decimals}f}"
