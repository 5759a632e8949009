"""How sure a mean over prompts and runs is: intervals, p-values and the correction for asking many questions.

The prompt is the unit: samples of one prompt are alike, so they are averaged first and prompts are resampled whole.
A method with several runs (seeds) has a second source of chance, crossed with the first: every run answers the same
prompts. Arrays are `[runs, other runs, prompts]`: what run i of one method and run j of another gave on prompt p;
an axis of one method alone has length 1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from rlhf.report.results import Estimate, Interval

Array = NDArray[np.float64]

# Resamples drawn at once: bounds the memory of the bootstrap to this many times the number of prompts.
BATCH = 256
FLIPS = 10_000


class Part(NamedTuple):
    """One source of chance: its share of the mean's variance and the degrees of freedom that it was estimated with."""

    variance: float
    freedom: float


def by_prompt(values: ArrayLike, prompt_ids: Sequence[str]) -> Array:
    """Average the last axis over the samples of each prompt: `[..., samples]` to `[..., prompts]`.

    Prompts come in the order in which they first appear.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.shape[-1:] != (len(prompt_ids),):
        raise ValueError(f"{len(prompt_ids)} prompt ids for values of shape {data.shape}")
    order = {name: place for place, name in enumerate(dict.fromkeys(prompt_ids))}
    member = np.zeros((len(prompt_ids), len(order)))
    member[np.arange(len(prompt_ids)), [order[name] for name in prompt_ids]] = 1
    means: Array = data @ (member / member.sum(axis=0))
    return means


def estimate(values: Array, seed: int, resamples: int, level: float) -> Estimate:
    """Return the mean of `values` `[runs, other runs, prompts]` with its interval and p-value.

    One run: the bootstrap over prompts, and a sign-flip test. Several: the half-width of the runs (Welch 1947) and
    that of the prompts (Student) added in quadrature. A bootstrap that resamples three runs sees two thirds of their
    variance and covers the truth in 80 to 90 cases of 100 where runs differ. By simulation this one does in 94 to 98
    (two runs: 95 to 99), the more where runs hardly differ: a spread seen twice or thrice may be larger than it looked.
    """
    mean, prompts = float(values.mean()), values.shape[-1]
    if values.shape[:-1] == (1, 1):
        gaps = values[0, 0]
        return Estimate(mean, mean_interval(gaps, seed, resamples, level), prompts, sign_flip(gaps, seed))
    if prompts < 2:
        return Estimate(mean, Interval(-math.inf, math.inf), prompts, 1.0)
    parts = variance_parts(values)
    half = _half_width(parts, 1 - level)
    p_value = _p_value(mean, parts) if half > 0 else sign_flip(values.mean(axis=(0, 1)), seed)
    return Estimate(mean, Interval(mean - half, mean + half), prompts, p_value)


def standard_error(values: Array) -> float:
    """Return the standard error of the mean of `values` `[runs, other runs, prompts]`; 0 for a single prompt."""
    return math.sqrt(sum(part.variance for part in variance_parts(values))) if values.shape[-1] > 1 else 0.0


def variance_parts(values: Array) -> list[Part]:
    """Split the variance of the mean into what runs and what prompts bring (a crossed two-way analysis).

    Both the spread of run means and the spread of prompt means hold the noise of single cells once, so it is taken
    off the prompts' part, which has the more degrees of freedom. The runs' part is there when there are several.
    """
    prompts = values.shape[-1]
    variance = float(values.mean(axis=(0, 1)).var(ddof=1)) / prompts
    runs = []
    for axis in (axis for axis in (0, 1) if values.shape[axis] > 1):
        cells = values.mean(axis=1 - axis)
        means = cells.mean(axis=1)
        count = len(means)
        runs.append(Part(float(means.var(ddof=1)) / count, count - 1))
        rest = cells - means[:, None] - cells.mean(axis=0) + cells.mean()
        variance -= float((rest**2).sum()) / ((count - 1) * (prompts - 1) * count * prompts)
    parts = [Part(max(variance, 0.0), prompts - 1)]
    total = sum(part.variance for part in runs)
    if total > 0:
        freedom = total**2 / sum(part.variance**2 / part.freedom for part in runs)
        parts.append(Part(total, freedom))
    return parts


def mean_interval(values: ArrayLike, seed: int, resamples: int, level: float = 0.95) -> Interval:
    """Return the BCa bootstrap interval of the mean of `values` [n], one independent value each (Efron 1987).

    Its level is raised to what a small sample needs, so that it is as wide as Student's for normal values ("expanded
    percentile", Hesterberg 2015, section 4.2). Equal values give an interval of no width. A single value says nothing
    of the spread: the interval is unbounded.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        return Interval(-math.inf, math.inf)
    mean = float(data.mean())
    if np.ptp(data) <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean)
    reach = math.sqrt(data.size / (data.size - 1)) * stats.t.ppf((1 + level) / 2, data.size - 1)
    wider = float(1 - 2 * stats.norm.cdf(-reach))
    settings = {"confidence_level": wider, "vectorized": True, "batch": BATCH}
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap((data,), np.mean, n_resamples=resamples, rng=np.random.default_rng(seed), **settings)
    interval = result.confidence_interval
    if not np.all(np.isfinite(interval)):  # BCa has no answer when every resample lies on one side of the mean
        interval = np.quantile(result.bootstrap_distribution, [(1 - wider) / 2, (1 + wider) / 2])
    return Interval(float(interval[0]), float(interval[1]))


def sign_flip(gaps: Array, seed: int) -> float:
    """Return the two-sided p-value of a mean of zero for paired differences `[n]` (Fisher 1935).

    Flipping signs is exact for any number of prompts where "no difference" makes both signs as likely; a bootstrap
    p-value is right for many prompts only.
    """
    if gaps.size < 2:
        return 1.0
    rng = np.random.default_rng(seed)
    total, reached = abs(float(gaps.sum())), 0
    slack = 1e-12 * float(np.abs(gaps).sum())
    for start in range(0, FLIPS, BATCH):
        signs = rng.integers(0, 2, (min(BATCH, FLIPS - start), gaps.size)) * 2.0 - 1
        reached += int((np.abs(signs @ gaps) >= total - slack).sum())
    return (reached + 1) / (FLIPS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for their number: the i-th smallest of m times m - i + 1, never falling.

    Holm 1979: calling those at most 5 % errs anywhere in the family in at most 5 % of cases.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected


def _half_width(parts: Sequence[Part], p_value: float) -> float:
    return math.sqrt(sum(part.variance * stats.t.isf(p_value / 2, part.freedom) ** 2 for part in parts))


def _p_value(mean: float, parts: Sequence[Part]) -> float:
    """Return the level at which the interval just reaches zero."""
    least = 1e-12
    if _half_width(parts, least) <= abs(mean):
        return least
    return float(optimize.brentq(lambda p: _half_width(parts, p) - abs(mean), least, 1.0))
