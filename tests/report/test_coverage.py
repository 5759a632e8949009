"""Simulated comparisons: how often the 95 % interval holds the truth, and how often nothing is called something."""

import numpy as np
import pytest

from rlhf.report.intervals import estimate, holm, sign_flips, variance_parts

TRIALS = 2000
# The interval's own noise is small beside its width at 400 resamples: coverage falls by about half a point.
RESAMPLES = 400


def covered(values, truth):
    """Return the share of trials whose interval holds the truth; values are `[trials, runs, other runs, prompts]`."""
    found = [estimate(trial, seed, RESAMPLES, 0.95).ci for seed, trial in enumerate(values)]
    return np.mean([interval.low <= truth <= interval.high for interval in found])


def runs(rng, count, spread, prompts=60, noise=0.3, trials=TRIALS):
    """Return `[trials, runs, prompts]`: a run's own luck, and noise in every cell."""
    return rng.normal(0, spread, (trials, count, 1)) + rng.normal(0, noise, (trials, count, prompts))


@pytest.fixture(autouse=True)
def no_p_values(monkeypatch):
    """Leave the p-values out, which the intervals do not depend on and which take most of the time."""
    monkeypatch.setattr("rlhf.report.intervals.sign_flips", lambda table, seed: [1.0] * len(table))
    monkeypatch.setattr("rlhf.report.intervals._p_value", lambda mean, parts: 1.0)


@pytest.mark.parametrize("shape", ["normal", "skewed", "few"])
def test_interval_over_prompts_covers_95_in_100(shape):
    rng = np.random.default_rng(11)
    prompts = 15 if shape == "few" else 60
    noise = rng.normal(0, 0.2, (TRIALS, 1, 1, prompts))
    gain = rng.exponential(0.3, noise.shape) if shape == "skewed" else rng.normal(0.3, 1, noise.shape)
    assert 0.93 <= covered(gain + noise, 0.3) <= 0.97


@pytest.mark.parametrize(("spread", "most"), [(0.0, 0.985), (0.1, 0.98), (0.3, 0.97), (1.0, 0.97)])
def test_interval_over_three_seeds_covers_95_in_100_and_a_little_more_where_seeds_hardly_differ(spread, most):
    """Difference to a baseline with one run: prompts differ by 0.4 in how much they gain."""
    rng = np.random.default_rng(12)
    prompts = rng.normal(0, 0.4, (TRIALS, 1, 60))
    values = (0.3 + prompts + runs(rng, 3, spread))[:, :, None]
    assert 0.93 <= covered(values, 0.3) <= most


@pytest.mark.parametrize(("count", "spread"), [(2, 0.1), (2, 0.5), (3, 0.1), (3, 0.5), (5, 0.2)])
def test_difference_of_two_methods_with_seeds_covers_at_least_94_in_100(count, spread):
    """Two spreads that must both be guessed from few runs: the interval errs on the wide side, never the other."""
    rng = np.random.default_rng(13)
    prompts = rng.normal(0, 0.4, (TRIALS, 1, 1, 60))
    one, other = runs(rng, count, spread), runs(rng, count, spread)
    assert covered(0.3 + prompts + one[:, :, None] - other[:, None], 0.3) >= 0.94


def test_two_seeds_are_wide_and_a_plain_bootstrap_over_three_would_not_cover():
    rng = np.random.default_rng(14)
    prompts = rng.normal(0, 0.4, (TRIALS, 1, 60))
    two = (prompts + runs(rng, 2, 0.3))[:, :, None]
    assert 0.94 <= covered(two, 0.0) <= 0.995
    three = (prompts + runs(rng, 3, 0.3))[:, :, None]
    halves = np.array([1.96 * np.sqrt(sum(part.variance for part in variance_parts(trial))) for trial in three])
    assert np.mean(np.abs(three.mean(axis=(1, 2, 3))) <= halves * np.sqrt(2 / 3)) < 0.87


def test_of_equal_methods_at_most_5_in_100_comparisons_call_any_pair():
    rng = np.random.default_rng(15)
    called = 0
    for seed in range(200):
        four = rng.normal(size=(4, 30))
        gaps = np.stack([four[i] - four[j] for i in range(4) for j in range(i)])
        called += min(holm(sign_flips(gaps, seed))) <= 0.05
    assert called / 200 <= 0.08
