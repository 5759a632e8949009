"""Win rates by hand, intervals that cover, pairing that pays, prompts as clusters."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rlhf.errors import TrainingError
from rlhf.report.results import CandidateSamples, Interval, Sample
from rlhf.report.statistics import by_prompt, compare, mean_interval, paired_difference, win_rate


def ids(prompts, each=1):
    return [f"p{prompt}" for prompt in range(prompts) for _ in range(each)]


def candidate(name, golds, prompt_ids, kind="sft", **other):
    sample = {"prompt": "q", "response": "r", "reward": 0.0, "kl": 0.0, "tokens": 5, "finish_reason": "stop"} | other
    samples = tuple(Sample(prompt_id=i, gold=float(gold), **sample) for i, gold in zip(prompt_ids, golds, strict=True))
    return CandidateSamples(name, kind, samples)


def test_by_prompt_averages_in_order_of_first_appearance():
    assert by_prompt([1, 10, 3, 20], ["b", "a", "b", "a"]).tolist() == [2.0, 15.0]


def test_by_prompt_refuses_values_of_another_length():
    with pytest.raises(ValueError, match="3 prompt ids"):
        by_prompt([1.0], ["a", "b", "c"])


def test_win_rate_by_hand_with_ties():
    # win, loss, tie, tie within the margin -> (1 + 0 + .5 + .5) / 4
    found = win_rate([2, 0, 1, 1], [1, 1, 1, 1 + 5e-7], ids(4), seed=0, resamples=200)
    assert found.value == 0.5
    assert found.n == 4
    assert 0 <= found.ci.low < 0.5 < found.ci.high <= 1
    assert win_rate([1.0, 0.0, 1.0, 1.0], [1, 1, 1, 1.2], ids(4), seed=0, resamples=200, tie_margin=0.5).value == 0.375


def test_win_rate_weighs_prompts_not_samples():
    # p0: three wins of three; p1: one loss of one. By prompt (1 + 0) / 2, by sample it would be 3/4.
    assert win_rate([1, 1, 1, 0], [0, 0, 0, 1], ["p0", "p0", "p0", "p1"], seed=0, resamples=100).value == 0.5


def test_win_rate_of_the_baseline_against_itself_is_one_half_without_doubt():
    golds = np.random.default_rng(0).normal(size=30)
    found = win_rate(golds, golds, ids(30), seed=0, resamples=100)
    assert (found.value, found.ci) == (0.5, Interval(0.5, 0.5))


@pytest.mark.parametrize("n", [1, 7, 40])
def test_winning_everything_keeps_the_exact_binomial_limit(n):
    won = win_rate(np.ones(n), np.zeros(n), ids(n), seed=0, resamples=100)
    exact = stats.binomtest(n, n).proportion_ci(0.95, method="exact")
    assert (won.value, won.ci.high) == (1.0, 1.0)
    assert won.ci.low == pytest.approx(exact.low)
    lost = win_rate(np.zeros(n), np.ones(n), ids(n), seed=0, resamples=100)
    assert (lost.value, lost.ci.low) == (0.0, 0.0)
    assert lost.ci.high == pytest.approx(1 - exact.low)


def test_interval_agrees_with_student_on_normal_data():
    data = np.random.default_rng(3).normal(5, 2, size=400)
    found = mean_interval(data, seed=1, resamples=4000)
    half = stats.t.ppf(0.975, 399) * data.std(ddof=1) / 20
    assert found.low == pytest.approx(data.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(data.mean() + half, abs=0.05 * half)


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


@pytest.mark.parametrize("data", [[0, 1], [0, 0, 0, 0, 1], [1] * 99 + [0], [0, 1e-9], [1e6, -1e6]])
def test_awkward_values_still_give_a_finite_interval_around_the_mean(data):
    found = mean_interval(data, seed=0, resamples=300)
    assert math.isfinite(found.low)
    assert math.isfinite(found.high)
    assert found.low <= np.mean(data) <= found.high


def test_paired_intervals_cover_the_truth():
    # Skewed differences of mean 0.3 on prompts of very different difficulty, two samples a prompt.
    rng, hits, prompts = np.random.default_rng(11), 0, 40
    names = ids(prompts, each=2)
    for trial in range(200):
        difficulty = np.repeat(rng.normal(0, 3, prompts), 2)
        gain = np.repeat(rng.exponential(0.3, prompts), 2) + rng.normal(0, 0.2, 2 * prompts)
        base = difficulty + rng.normal(0, 0.2, 2 * prompts)
        found = paired_difference(difficulty + gain, base, names, seed=trial, resamples=400)
        hits += found.ci.low <= 0.3 <= found.ci.high
    assert 0.89 <= hits / 200 <= 0.99


def test_pairing_narrows_the_interval_on_correlated_data():
    rng = np.random.default_rng(5)
    difficulty = rng.normal(0, 2, 60)
    a, b = difficulty + 0.4 + rng.normal(0, 0.2, 60), difficulty + rng.normal(0, 0.2, 60)
    paired = paired_difference(a, b, ids(60), seed=0, resamples=1000)
    unpaired = stats.bootstrap((a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), n_resamples=1000, rng=0)
    width = unpaired.confidence_interval.high - unpaired.confidence_interval.low
    assert paired.ci.high - paired.ci.low < 0.25 * width
    assert paired.value == pytest.approx((a - b).mean())


def test_repeating_samples_of_a_prompt_adds_no_certainty():
    rng = np.random.default_rng(6)
    a, b = rng.normal(0.2, 1, 30), rng.normal(0, 1, 30)
    once = paired_difference(a, b, ids(30), seed=4, resamples=500)
    again = paired_difference(np.repeat(a, 8), np.repeat(b, 8), ids(30, each=8), seed=4, resamples=500)
    assert again.n == once.n == 30
    assert again.ci.low == pytest.approx(once.ci.low)
    assert again.ci.high == pytest.approx(once.ci.high)


def test_compare_measures_every_candidate_and_every_pair():
    names = ids(12, each=2)
    base = np.arange(24.0)
    sft, ppo = candidate("sft", base, names), candidate("ppo", base + 1, names, "ppo", reward=2.0, kl=3.0, tokens=9)
    cut = replace(ppo.samples[0], finish_reason="length", response="another")
    dpo = candidate("dpo", base - 1, names, "dpo")
    found = compare([sft, replace(ppo, samples=(cut, *ppo.samples[1:])), dpo], "sft", seed=1, resamples=200)
    assert [(item.name, item.kind) for item in found.candidates] == [("sft", "sft"), ("ppo", "ppo"), ("dpo", "dpo")]
    assert (found.prompts, found.samples) == (12, 24)
    ppo_result = found.candidate("ppo")
    assert (ppo_result.gold, ppo_result.reward, ppo_result.kl, ppo_result.length) == (12.5, 2.0, 3.0, 9.0)
    assert (ppo_result.win_rate, found.candidate("dpo").win_rate, found.candidate("sft").win_rate) == (1.0, 0.0, 0.5)
    assert (ppo_result.truncated, ppo_result.distinct) == (1 / 24, 2 / 24)
    pairs = [(item.candidate, item.baseline) for item in found.differences if item.metric == "gold"]
    assert pairs == [("ppo", "sft"), ("dpo", "sft"), ("dpo", "ppo")]
    # Every prompt differs by exactly 1, so paired there is no doubt, however much prompts differ.
    gap = found.difference("ppo", "sft", "gold")
    assert (gap.difference, gap.ci) == (1.0, Interval(1.0, 1.0))
    assert found.difference("ppo", "dpo", "gold").difference == 2.0
    assert found.difference("dpo", "ppo", "gold").ci == Interval(-2.0, -2.0)


def test_compare_does_not_depend_on_the_order_of_candidates():
    rng, names = np.random.default_rng(0), ids(15)
    three = [candidate(name, rng.normal(size=15), names) for name in ("a", "b", "c")]
    one, other = compare(three, "a", 3, 300), compare(three[::-1], "a", 3, 300)
    assert {item.name: item for item in one.candidates} == {item.name: item for item in other.candidates}
    assert one.difference("b", "c", "gold").difference == other.difference("b", "c", "gold").difference


def test_compare_refuses_what_would_mislead():
    sft = candidate("sft", [0.0, 1.0], ["p0", "p1"])
    with pytest.raises(TrainingError, match="ppo was not sampled on the same prompts"):
        compare([sft, candidate("ppo", [0.0, 1.0], ["p1", "p0"])], "sft", 0, 10)
    with pytest.raises(TrainingError, match=r"ppo has gold = nan for prompt 'p1' \(1 of 2 samples\)"):
        compare([sft, candidate("ppo", [0.0, math.nan], ["p0", "p1"])], "sft", 0, 10)
    with pytest.raises(TrainingError, match="'base' among them"):
        compare([sft], "base", 0, 10)
    with pytest.raises(TrainingError, match="different names"):
        compare([sft, sft], "sft", 0, 10)
    with pytest.raises(TrainingError, match="no samples"):
        compare([candidate("sft", [], [])], "sft", 0, 10)
