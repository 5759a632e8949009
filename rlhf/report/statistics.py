"""Means, win rates and differences with bootstrap intervals over prompts.

The prompt is the unit of everything: samples of one prompt are alike, so they are averaged first and prompts are
resampled whole. Candidates answer the same prompts, so differences are taken prompt by prompt (paired), which
removes the spread between easy and hard prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rlhf.errors import TrainingError
from rlhf.report.results import (
    METRICS,
    CandidateResult,
    CandidateSamples,
    Comparison,
    Estimate,
    Interval,
    Metric,
    PairedDifference,
)

Array = NDArray[np.float64]

# Resamples drawn at once: bounds the memory of the bootstrap to this many times the number of prompts.
BATCH = 256


def mean_interval(values: ArrayLike, seed: int, resamples: int, level: float = 0.95) -> Interval:
    """Return the BCa bootstrap interval of the mean of `values` [n], one independent value each (Efron 1987).

    Equal values give an interval of no width. A single value says nothing of the spread: the interval is unbounded.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2:
        return Interval(-math.inf, math.inf)
    mean = float(data.mean())
    if np.ptp(data) <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean)
    settings = {"confidence_level": level, "vectorized": True, "batch": BATCH}
    result = stats.bootstrap((data,), np.mean, n_resamples=resamples, rng=np.random.default_rng(seed), **settings)
    interval = result.confidence_interval
    if not np.all(np.isfinite(interval)):  # BCa has no answer when every resample lies on one side of the mean
        interval = np.quantile(result.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(interval[0]), float(interval[1]))


def by_prompt(values: ArrayLike, prompt_ids: Sequence[str]) -> Array:
    """Average the values of each prompt; returns [prompts], in the order in which prompts first appear."""
    data = np.asarray(values, dtype=np.float64)
    if data.shape != (len(prompt_ids),):
        raise ValueError(f"{len(prompt_ids)} prompt ids for values of shape {data.shape}")
    order = {name: place for place, name in enumerate(dict.fromkeys(prompt_ids))}
    place = np.array([order[name] for name in prompt_ids])
    return np.bincount(place, weights=data) / np.bincount(place)


def paired_difference(
    a: ArrayLike, b: ArrayLike, prompt_ids: Sequence[str], seed: int, resamples: int, level: float = 0.95
) -> Estimate:
    """Return the mean of a - b over prompts; `a`, `b` and `prompt_ids` are per sample, in the same order."""
    gap = by_prompt(a, prompt_ids) - by_prompt(b, prompt_ids)
    return Estimate(float(gap.mean()), mean_interval(gap, seed, resamples, level), len(gap))


def win_rate(
    candidate_gold: ArrayLike,
    baseline_gold: ArrayLike,
    prompt_ids: Sequence[str],
    seed: int,
    resamples: int,
    tie_margin: float = 1e-6,
    level: float = 0.95,
) -> Estimate:
    """Return the share of samples with the better gold score, a tie (within `tie_margin`) counting one half.

    Sample i of one meets sample i of the other, on the same prompt. When the candidate wins (or loses) everything
    the bootstrap sees no spread; the exact binomial limit over prompts stands in (Clopper & Pearson 1934).
    """
    gap = np.asarray(candidate_gold, dtype=np.float64) - np.asarray(baseline_gold, dtype=np.float64)
    outcome = np.where(np.abs(gap) <= tie_margin, 0.5, (gap > 0).astype(np.float64))
    wins = by_prompt(outcome, prompt_ids)
    mean, n = float(wins.mean()), len(wins)
    if mean in (0.0, 1.0):
        limit = ((1 - level) / 2) ** (1 / n)
        interval = Interval(limit, 1.0) if mean == 1.0 else Interval(0.0, 1 - limit)
    else:
        found = mean_interval(wins, seed, resamples, level)
        interval = Interval(max(found.low, 0.0), min(found.high, 1.0))
    return Estimate(mean, interval, n)


def compare(
    candidates: Sequence[CandidateSamples],
    baseline: str,
    seed: int,
    resamples: int,
    level: float = 0.95,
    tie_margin: float = 1e-6,
) -> Comparison:
    """Measure every candidate and every pair of candidates; `baseline` names the one that win rates are against.

    Raises TrainingError when candidates were not sampled on the same prompts or a score is not finite.
    """
    prompt_ids = _checked(candidates, baseline)
    columns = {item.name: _columns(item) for item in candidates}
    wins = [
        win_rate(columns[item.name]["gold"], columns[baseline]["gold"], prompt_ids, seed, resamples, tie_margin, level)
        for item in candidates
    ]
    results = []
    for item, won in zip(candidates, wins, strict=True):
        means = {metric: by_prompt(columns[item.name][metric], prompt_ids) for metric in METRICS}
        found = {
            metric: Estimate(float(values.mean()), mean_interval(values, seed, resamples, level), len(values))
            for metric, values in means.items()
        }
        results.append(_result(item, found, won))
    differences = []
    for name, other in _pairs([item.name for item in candidates], baseline):
        for metric in METRICS:
            gap = paired_difference(columns[name][metric], columns[other][metric], prompt_ids, seed, resamples, level)
            differences.append(PairedDifference(name, other, metric, gap.value, gap.ci, gap.n))
    return Comparison(
        baseline=baseline,
        candidates=tuple(results),
        differences=tuple(differences),
        prompts=len(set(prompt_ids)),
        samples=len(prompt_ids),
        seed=seed,
        bootstrap_samples=resamples,
        level=level,
        tie_margin=tie_margin,
    )


def _result(item: CandidateSamples, found: Mapping[Metric, Estimate], won: Estimate) -> CandidateResult:
    return CandidateResult(
        name=item.name,
        kind=item.kind,
        gold=found["gold"].value,
        gold_ci=found["gold"].ci,
        reward=found["reward"].value,
        reward_ci=found["reward"].ci,
        kl=found["kl"].value,
        kl_ci=found["kl"].ci,
        length=found["length"].value,
        length_ci=found["length"].ci,
        win_rate=won.value,
        win_rate_ci=won.ci,
        truncated=sum(sample.finish_reason == "length" for sample in item.samples) / len(item.samples),
        distinct=len({sample.response for sample in item.samples}) / len(item.samples),
    )


def _columns(item: CandidateSamples) -> dict[Metric, Array]:
    samples = item.samples
    return {
        "gold": np.array([sample.gold for sample in samples], dtype=np.float64),
        "reward": np.array([sample.reward for sample in samples], dtype=np.float64),
        "kl": np.array([sample.kl for sample in samples], dtype=np.float64),
        "length": np.array([sample.tokens for sample in samples], dtype=np.float64),
    }


def _pairs(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    others = [name for name in names if name != baseline]
    return [(name, baseline) for name in others] + [(late, early) for early, late in combinations(others, 2)]


def _checked(candidates: Sequence[CandidateSamples], baseline: str) -> list[str]:
    names = [item.name for item in candidates]
    if baseline not in names or len(set(names)) != len(names):
        raise TrainingError(f"compare: need candidates of different names with {baseline!r} among them, got {names}")
    prompt_ids = [sample.prompt_id for sample in candidates[0].samples]
    if not prompt_ids:
        raise TrainingError("compare: there are no samples to compare; check the stage's prompts")
    for item in candidates:
        if [sample.prompt_id for sample in item.samples] != prompt_ids:
            raise TrainingError(
                f"compare: {item.name} was not sampled on the same prompts, in the same order, as {names[0]}"
            )
        for metric, column in _columns(item).items():
            bad = np.flatnonzero(~np.isfinite(column))
            if bad.size:
                raise TrainingError(
                    f"compare: {item.name} has {metric} = {column[bad[0]]} for prompt {prompt_ids[bad[0]]!r} "
                    f"({bad.size} of {len(column)} samples); fix the judge so that every score is finite"
                )
    return prompt_ids
