"""How sure a mean over prompts and runs is: intervals, p-values and the correction for asking many questions.

The prompt is the unit: samples of one prompt are alike, so they are averaged first and prompts are resampled whole.
A method with several runs (seeds) has a second source of chance, crossed with the first: every run answers the same
prompts. Arrays are `[runs, other runs, prompts]`: what run i of one method and run j of another gave on prompt p;
an axis of one method alone has length 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special, stats

from rlhf.report.results import Estimate, Interval

Array = NDArray[np.float64]

BATCH = 256
CELLS = 1 << 23
"""Resamples drawn at once, at most, and numbers in them: what bounds the memory of the bootstrap."""

BLOCK = 1 << 15

FLIPS = 10_000


class Part(NamedTuple):
    """One source of chance: its share of the mean's variance and the degrees of freedom that it was estimated with."""

    variance: float
    freedom: float


class Groups:
    """Which samples belong to which prompt; prompts come in the order in which they first appear."""

    def __init__(self, prompt_ids: Sequence[str]) -> None:
        order: dict[str, int] = {}
        self.member = np.array([order.setdefault(name, len(order)) for name in prompt_ids], dtype=np.intp)
        self.counts = np.bincount(self.member, minlength=len(order)).astype(np.float64)

    def means(self, values: ArrayLike) -> Array:
        """Average the last axis over the samples of each prompt: `[..., samples]` to `[..., prompts]`."""
        data = np.asarray(values, dtype=np.float64)
        if data.shape[-1:] != self.member.shape:
            raise ValueError(f"{len(self.member)} prompt ids for values of shape {data.shape}")
        if len(self.counts) == len(self.member):
            return data
        rows = data.reshape(-1, data.shape[-1])
        sums = [np.bincount(self.member, weights=row, minlength=len(self.counts)) for row in rows]
        return (np.stack(sums) / self.counts).reshape(*data.shape[:-1], len(self.counts))


def estimate(values: Array, seed: int, resamples: int, level: float) -> Estimate:
    """Return what `estimates` says of one array."""
    return next(iter(estimates([values], seed, resamples, level)))


def estimates(each: Iterable[Array], seed: int, resamples: int, level: float) -> list[Estimate]:
    """Return the mean of each `values` `[runs, other runs, prompts]` with its interval and p-value, in order.

    One run: the bootstrap over prompts, and a sign-flip test; arrays with as many prompts share the resamples and the
    flips. Several: the half-width of the runs (Welch 1947) and that of the prompts (Student) added in quadrature. A
    bootstrap that resamples three runs sees two thirds of their variance and covers the truth in 80 to 90 cases of 100
    where runs differ. By simulation this one does in 94 to 98 (two runs: 95 to 99), the more where runs hardly differ:
    a spread seen twice or thrice may be larger than it looked.
    """
    found: dict[int, Estimate] = {}
    alone: dict[int, dict[int, Array]] = {}
    for place, values in enumerate(each):
        if values.shape[:-1] == (1, 1):
            alone.setdefault(values.shape[-1], {})[place] = values[0, 0]
        else:
            found[place] = _of_runs(values, seed, level)
    for prompts, columns in alone.items():
        table = np.stack(list(columns.values()))
        intervals = mean_intervals(table, seed, resamples, level)
        measured = zip(columns, table.mean(axis=1).tolist(), intervals, sign_flips(table, seed), strict=True)
        found |= {place: Estimate(mean, ci, prompts, p_value) for place, mean, ci, p_value in measured}
    return [found[place] for place in range(len(found))]


def _of_runs(values: Array, seed: int, level: float) -> Estimate:
    mean, prompts = float(values.mean()), values.shape[-1]
    if prompts < 2:
        return Estimate(mean, Interval(-math.inf, math.inf), prompts, 1.0)
    parts = variance_parts(values)
    half = _half_width(parts, 1 - level)
    p_value = _p_value(mean, parts) if half > 0 else sign_flips(values.mean(axis=(0, 1))[None], seed)[0]
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


def mean_intervals(table: Array, seed: int, resamples: int, level: float = 0.95) -> list[Interval]:
    """Return the BCa bootstrap interval of the mean of each row of `[rows, n]`, of n independent values (Efron 1987).

    Its level is raised to what a small sample needs, so that it is as wide as Student's for normal values ("expanded
    percentile", Hesterberg 2015, section 4.2). Equal values give an interval of no width. A single value says nothing
    of the spread: the interval is unbounded. The numbers are those of `scipy.stats.bootstrap` with the same seed; for
    a mean the acceleration follows from the values themselves, without leaving out each in turn.
    """
    rows, size = table.shape
    if size < 2:
        return [Interval(-math.inf, math.inf)] * rows
    means = table.mean(axis=1)
    found = [Interval(mean, mean) for mean in means.tolist()]
    spread = np.flatnonzero(np.ptp(table, axis=1) > 1e-12 * np.maximum(1.0, np.abs(means)))
    if spread.size:
        reach = math.sqrt(size / (size - 1)) * stats.t.ppf((1 + level) / 2, size - 1)
        drawn = resampled_means(table[spread], seed, resamples)
        for row, distribution in zip(spread.tolist(), drawn.T, strict=True):
            found[row] = _bca(table[row], distribution, reach)
    return found


def _bca(values: Array, distribution: Array, reach: float) -> Interval:
    """Return the bias-corrected and accelerated interval that reaches `reach` standard errors (Efron 1987, eq. 6.8)."""
    mean = float(values.mean())
    slack = 1e-12 * float(np.abs(values).mean())
    below = (np.count_nonzero(distribution < mean - slack) + np.count_nonzero(distribution <= mean + slack)) / 2
    bias = special.ndtri(below / len(distribution))
    gaps = values - mean
    acceleration = float((gaps**3).sum()) / (6 * float((gaps**2).sum()) ** 1.5)
    with np.errstate(invalid="ignore", divide="ignore"):
        ends = bias + np.array([-reach, reach])
        shares = special.ndtr(bias + ends / (1 - acceleration * ends))
    if not np.all(np.isfinite(shares)):  # BCa has no answer when every resample lies on one side of the mean
        shares = special.ndtr(np.array([-reach, reach]))
    low, high = np.quantile(distribution, shares).tolist()
    return Interval(low, high)


def resampled_means(table: Array, seed: int, resamples: int) -> Array:
    """Return `[resamples, rows]`: the means of n values drawn with replacement from `[rows, n]`, the same for all rows.

    A resample is how often each value was drawn, so all rows take one product of matrices.
    """
    rng, (rows, size) = np.random.default_rng(seed), table.shape
    means = np.empty((resamples, rows))
    counts = np.empty((_together(size, resamples), size))
    for start in range(0, resamples, len(counts)):
        part = counts[: resamples - start]
        for some in _blocks(part):
            drawn = rng.integers(0, size, some.shape) + size * np.arange(len(some))[:, None]
            some[:] = np.bincount(drawn.ravel(), minlength=some.size).reshape(some.shape)
        np.divide(part @ table.T, size, out=means[start : start + len(part)])
    return means


def sign_flips(table: Array, seed: int) -> list[float]:
    """Return the two-sided p-values of a mean of zero for paired differences, each row of `[rows, n]` (Fisher 1935).

    Flipping signs is exact for any number of prompts where "no difference" makes both signs as likely; a bootstrap
    p-value is right for many prompts only.
    """
    rows, size = table.shape
    if size < 2:
        return [1.0] * rows
    rng = np.random.default_rng(seed)
    reached = np.zeros(rows, dtype=np.int64)
    enough = np.abs(table.sum(axis=1)) - 1e-12 * np.abs(table).sum(axis=1)
    signs = np.empty((_together(size, FLIPS), size))
    for start in range(0, FLIPS, len(signs)):
        part = signs[: FLIPS - start]
        for some in _blocks(part):
            some[:] = rng.integers(0, 2, some.shape)
        part *= 2
        part -= 1
        reached += (np.abs(part @ table.T) >= enough).sum(axis=0)
    return [(count + 1) / (FLIPS + 1) for count in reached.tolist()]


def _together(size: int, most: int) -> int:
    """Return how many rows of `size` numbers are made at once."""
    return max(1, min(most, BATCH, CELLS // size))


def _blocks(rows: Array) -> Iterator[Array]:
    """Yield neighbouring rows together that a processor's cache holds."""
    most = max(1, BLOCK // rows.shape[1])
    return (rows[start : start + most] for start in range(0, len(rows), most))


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
