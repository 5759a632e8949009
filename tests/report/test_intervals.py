"""Intervals by hand and against Student, prompts as clusters, runs as a second source of chance, Holm by hand."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from rlhf.report.intervals import (
    Groups,
    estimate,
    estimates,
    holm,
    mean_intervals,
    sign_flips,
    standard_error,
    variance_parts,
)
from rlhf.report.results import Interval


def measured(values, seed=0, resamples=500, level=0.95):
    return estimate(np.asarray(values, dtype=np.float64), seed, resamples, level)


def mean_interval(data, seed, resamples, level=0.95):
    return mean_intervals(np.asarray(data, dtype=np.float64)[None], seed, resamples, level)[0]


def sign_flip(gaps, seed):
    return sign_flips(gaps[None], seed)[0]


def test_prompts_are_averaged_in_order_of_first_appearance():
    assert Groups(["b", "a", "b", "a"]).means([1, 10, 3, 20]).tolist() == [2.0, 15.0]
    assert Groups(["b", "a", "b"]).means([[1, 10, 3], [0, 0, 9]]).tolist() == [[2.0, 10.0], [4.5, 0.0]]


def test_values_of_another_length_are_refused():
    with pytest.raises(ValueError, match="3 prompt ids"):
        Groups(["a", "b", "c"]).means([1.0])


def test_interval_agrees_with_student_on_normal_data():
    for n in (12, 400):
        data = np.random.default_rng(3).normal(5, 2, size=n)
        found = mean_interval(data, seed=1, resamples=20_000)
        half = stats.t.ppf(0.975, n - 1) * data.std(ddof=1) / math.sqrt(n)
        assert (found.high - found.low) / (2 * half) == pytest.approx(1, abs=0.06)
        assert (found.low + found.high) / 2 == pytest.approx(data.mean(), abs=0.2 * half)


def test_a_higher_level_gives_a_wider_interval():
    data = np.random.default_rng(3).normal(size=50)
    narrow, wide = (mean_interval(data, 1, 1000, level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_same_seed_same_interval_other_seed_another():
    data = np.random.default_rng(3).normal(size=50)
    assert mean_interval(data, 1, 500) == mean_interval(data, 1, 500)
    assert mean_interval(data, 1, 500) != mean_interval(data, 2, 500)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e9])
def test_equal_values_give_an_interval_of_no_width(value):
    found = mean_interval([value] * 9, seed=0, resamples=100)
    assert found.low == found.high == pytest.approx(value)


def test_one_value_says_nothing_of_the_spread():
    assert mean_interval([3.0], seed=0, resamples=100) == Interval(-math.inf, math.inf)
    assert measured([[[3.0]]]).p_value == 1
    several = measured([[[3.0]], [[4.0]]])
    assert (several.ci, several.p_value) == (Interval(-math.inf, math.inf), 1)


@pytest.mark.parametrize("data", [[0, 1], [0, 0, 0, 0, 1], [1] * 99 + [0], [0, 1e-9], [1e6, -1e6]])
def test_awkward_values_still_give_a_finite_interval_around_the_mean(data):
    found = mean_interval(data, seed=0, resamples=300)
    assert found.bounded
    assert found.low <= np.mean(data) <= found.high


@pytest.mark.parametrize("n", [8, 40, 700])
@pytest.mark.parametrize("kind", ["normal", "wins", "skewed"])
def test_intervals_are_those_of_scipys_bootstrap_with_the_same_seed(n, kind):
    rng = np.random.default_rng(n)
    values = {"normal": rng.normal(3, 2, n), "wins": rng.choice([0, 0.5, 1], n), "skewed": rng.gamma(0.5, 1, n)}[kind]
    reach = math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)
    level = 1 - 2 * stats.norm.cdf(-reach)
    scipys = stats.bootstrap((values,), np.mean, n_resamples=999, confidence_level=level, rng=np.random.default_rng(4))
    found = mean_interval(values, seed=4, resamples=999)
    assert tuple(found) == pytest.approx(tuple(scipys.confidence_interval), rel=1e-9)


def test_a_mean_is_measured_alike_alone_and_beside_others(monkeypatch):
    rng = np.random.default_rng(11)
    several = [rng.normal(size=(1, 1, 30)), rng.normal(size=(2, 1, 30)), rng.normal(size=(1, 1, 30))]
    alone = [measured(values) for values in several]
    together = estimates(iter(several), 0, 500, 0.95)
    monkeypatch.setattr("rlhf.report.intervals.CELLS", 100)  # three resamples at once
    for found in (together, estimates(several, 0, 500, 0.95)):
        assert [item.p_value for item in found] == [item.p_value for item in alone]
        assert [tuple(item.ci) for item in found] == [pytest.approx(tuple(item.ci)) for item in alone]


def memory(work):
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_grows_with_the_samples_and_not_with_their_square(monkeypatch):
    monkeypatch.setattr("rlhf.report.intervals.CELLS", 1000)
    monkeypatch.setattr("rlhf.report.intervals.FLIPS", 20)

    def work(prompts):
        groups = Groups([f"p{prompt}" for prompt in range(prompts) for _ in range(2)])
        values = np.arange(2.0 * prompts)[None, None]
        return lambda: estimate(groups.means(values), 0, 20, 0.95)

    few, many = (memory(work(prompts)) for prompts in (2000, 8000))
    assert many < 5 * few


def test_pairing_narrows_the_interval_on_correlated_data():
    rng = np.random.default_rng(5)
    difficulty = rng.normal(0, 2, 60)
    a, b = difficulty + 0.4 + rng.normal(0, 0.2, 60), difficulty + rng.normal(0, 0.2, 60)
    paired = measured((a - b)[None, None], resamples=1000)
    unpaired = stats.bootstrap((a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=1000, rng=0)
    width = unpaired.confidence_interval.high - unpaired.confidence_interval.low
    assert paired.ci.high - paired.ci.low < 0.25 * width
    assert paired.value == pytest.approx((a - b).mean())


def test_repeating_samples_of_a_prompt_adds_no_certainty():
    gaps = np.random.default_rng(6).normal(0.2, 1, 30)
    ids = [f"p{prompt}" for prompt in range(30) for _ in range(8)]
    again = measured(Groups(ids).means(np.repeat(gaps, 8))[None, None])
    once = measured(gaps[None, None])
    assert again.n == 30
    assert tuple(again.ci) == pytest.approx(tuple(once.ci))


def test_sign_flips_agree_with_every_flip_tried():
    gaps = np.array([0.9, -0.2, 1.4, 0.3, 0.8, -0.1, 0.6, 1.1])
    flips = np.array(list(itertools.product([-1, 1], repeat=8)))
    exact = float((np.abs(flips @ gaps) >= abs(gaps.sum()) - 1e-9).mean())
    assert sign_flip(gaps, seed=3) == pytest.approx(exact, abs=0.01)
    assert sign_flip(np.ones(6), seed=3) == pytest.approx(2 / 2**6, abs=0.01)
    assert sign_flip(np.zeros(6), seed=3) == 1


def test_p_values_of_no_difference_are_uniform():
    rng = np.random.default_rng(8)
    found = [sign_flip(rng.normal(size=20), seed) for seed in range(200)]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_parts_of_the_variance_by_hand():
    # Two runs, three prompts. Run means 2 and 5; prompt means 2.5, 3, 5; the residuals are +-0.5, 0, -+0.5.
    values = np.array([[[1.5, 1.5, 3.0]], [[3.5, 4.5, 7.0]]])
    prompts, runs = variance_parts(values)
    assert runs == (((2 - 5) ** 2 / 2) / 2, 1)
    rest = 2 * (0.5**2 + 0 + 0.5**2) / ((2 - 1) * (3 - 1)) / 6
    assert prompts.variance == pytest.approx(np.var([2.5, 3, 5], ddof=1) / 3 - rest)
    assert prompts.freedom == 2
    half = math.sqrt(prompts.variance * stats.t.ppf(0.975, 2) ** 2 + runs.variance * stats.t.ppf(0.975, 1) ** 2)
    found = measured(values)
    assert tuple(found.ci) == pytest.approx((3.5 - half, 3.5 + half))
    assert standard_error(values) == pytest.approx(math.sqrt(prompts.variance + runs.variance))


def test_runs_that_agree_add_nothing_and_runs_alone_are_student():
    gaps = np.random.default_rng(2).normal(0.3, 1, 40)
    same = measured(np.stack([gaps, gaps, gaps])[:, None])
    half = stats.t.ppf(0.975, 39) * gaps.std(ddof=1) / math.sqrt(40)
    assert same.ci.high - same.value == pytest.approx(half)
    means = np.array([0.1, 0.5, 0.9])
    flat = measured(np.repeat(means[:, None, None], 40, axis=2))
    assert flat.ci.high - 0.5 == pytest.approx(stats.t.ppf(0.975, 2) * 0.4 / math.sqrt(3))
    assert flat.p_value == pytest.approx(stats.ttest_1samp(means, 0).pvalue)


def test_two_methods_with_runs_are_welch_where_prompts_do_not_differ():
    a, b = np.array([0.1, 0.5, 0.9]), np.array([1.0, 1.2])
    found = measured(np.repeat((a[:, None] - b[None])[..., None], 30, axis=2))
    welch = stats.ttest_ind(a, b, equal_var=False)
    assert found.p_value == pytest.approx(welch.pvalue)
    assert tuple(found.ci) == pytest.approx(tuple(welch.confidence_interval()))


def test_interval_and_p_value_of_several_runs_say_the_same():
    rng = np.random.default_rng(4)
    for gap in (0.0, 0.3, 0.6, 1.5):
        values = gap + rng.normal(0, 0.2, (3, 1, 1)) + rng.normal(0, 0.5, (3, 1, 25))
        found = measured(values)
        assert (found.p_value < 0.05) == (found.ci.above_zero or found.ci.below_zero)


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, never falling.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
