"""What is compared with what: every method, every pair, runs together, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from made import comparison, samples, spent

from rlhf.errors import TrainingError
from rlhf.recipe.base import Budget
from rlhf.report.results import Interval
from rlhf.report.samples import CandidateSamples, Sample, Samples
from rlhf.report.statistics import compare


def ids(prompts, each=1):
    return [f"p{prompt}" for prompt in range(prompts) for _ in range(each)]


def candidate(name, golds, prompt_ids, kind="sft", **other):
    sample = {"prompt": "q", "response": "r", "reward": 0.0, "kl": 0.0, "tokens": 5, "finish_reason": "stop"}
    sample |= {"entropy": 1.0} | other
    rows = tuple(Sample(prompt_id=i, gold=float(gold), **sample) for i, gold in zip(prompt_ids, golds, strict=True))
    return CandidateSamples(name, kind, Samples.of(rows))


def test_compare_measures_every_candidate_and_every_pair():
    names = ids(12, each=2)
    base = np.arange(24.0)
    sft, ppo = candidate("sft", base, names), candidate("ppo", base + 1, names, "ppo", reward=2.0, kl=3.0, tokens=9)
    cut = replace(ppo.samples[0], finish_reason="length", response="another")
    dpo = candidate("dpo", base - 1, names, "dpo")
    found = compare([sft, replace(ppo, samples=Samples.of([cut, *ppo.samples[1:]])), dpo], "sft", seed=1, resamples=200)
    assert [(item.name, item.kind) for item in found.candidates] == [("sft", "sft"), ("ppo", "ppo"), ("dpo", "dpo")]
    assert (found.prompts, found.samples, found.runs) == (12, 24, 1)
    ppo_result = found.candidate("ppo")
    assert (ppo_result.gold, ppo_result.reward, ppo_result.kl, ppo_result.length) == (12.5, 2.0, 3.0, 9.0)
    assert (ppo_result.win_rate, found.candidate("dpo").win_rate, found.candidate("sft").win_rate) == (1.0, 0.0, 0.5)
    assert (ppo_result.truncated, ppo_result.distinct) == (1 / 24, 2 / 24)
    assert found.candidate("sft").win_rate_ci == Interval(0.5, 0.5)
    pairs = [(item.candidate, item.baseline) for item in found.differences if item.metric == "gold"]
    assert pairs == [("ppo", "sft"), ("dpo", "sft"), ("dpo", "ppo")]
    # Every prompt differs by exactly 1, so paired there is no doubt, however much prompts differ.
    gap = found.difference("ppo", "sft", "gold")
    assert (gap.difference, gap.ci) == (1.0, Interval(1.0, 1.0))
    assert found.difference("ppo", "dpo", "gold").difference == 2.0
    assert found.difference("dpo", "ppo", "gold").ci == Interval(-2.0, -2.0)


def test_runs_of_a_method_make_one_row_with_the_mean_of_their_means():
    runs = [samples(f"ppo@{seed}", gold=gold, kl=seed) for seed, gold in ((1, 0.2), (2, 0.4), (3, 0.9))]
    found = comparison(samples("sft"), *runs, samples("dpo", gold=0.5))
    ppo = found.candidate("ppo")
    assert [item.name for item in found.candidates] == ["sft", "ppo", "dpo"]
    assert ([run.name for run in ppo.runs], ppo.kind) == (["ppo@1", "ppo@2", "ppo@3"], "ppo")
    assert ppo.gold == pytest.approx(np.mean([run.gold for run in ppo.runs]))
    assert [run.kl for run in ppo.runs] == pytest.approx([1, 2, 3])
    gap = found.difference("ppo", "sft", "gold")
    assert gap.difference == pytest.approx(0.5)
    # Run means 0.2, 0.4, 0.9 have a standard error of 0.21, times t(2) = 4.3; prompts bring little.
    assert gap.ci.high - gap.difference == pytest.approx(0.9, abs=0.05)
    assert not gap.clear
    assert found.difference("dpo", "sft", "gold").clear
    assert [point.run for point in found.frontier] == ["sft", "ppo@1", "ppo@2", "ppo@3", "dpo"]


def test_the_baseline_may_have_runs_too():
    found = comparison(samples("sft@1"), samples("sft@2", gold=0.1), samples("ppo", gold=1.0))
    assert found.baseline == "sft"
    assert found.candidate("sft").win_rate == 0.5
    assert found.candidate("ppo").win_rate == 1
    assert found.difference("ppo", "sft", "gold").difference == pytest.approx(0.95)


def test_without_a_proxy_its_column_is_not_there():
    found = comparison(samples("sft", reward=None), samples("ppo", gold=1.0, reward=None))
    assert found.metrics == ["gold", "kl", "length"]
    assert {item.metric for item in found.differences} == {"gold", "kl", "length"}
    assert [(item.reward, item.reward_ci) for item in found.candidates] == [(None, None)] * 2
    with pytest.raises(TrainingError, match="some have none"):
        comparison(samples("sft"), samples("ppo", reward=None))


def test_clear_needs_the_corrected_p_value():
    # Twenty methods without a difference: some pair looks clear by its interval alone, none after the correction.
    rng = np.random.default_rng(1)
    plain = [candidate(f"m{place}", rng.normal(size=40), ids(40)) for place in range(12)]
    found = compare(plain, "m0", seed=1, resamples=400)
    golds = [item for item in found.differences if item.metric == "gold"]
    alone = [item for item in golds if item.ci.above_zero or item.ci.below_zero]
    assert len(golds) == 66
    assert alone
    assert all(item.p_corrected >= item.p_value for item in golds)
    assert not any(item.clear for item in golds)
    assert alone[0].reversed().clear == alone[0].clear


def test_costs_are_means_of_the_runs_and_shares_of_the_nearest_limit():
    one, two = spent(samples("ppo@1"), 100, 40, 10.0, 0.6), spent(samples("ppo@2"), 300, 40, 30.0, 0.8)
    budget = Budget(gradient_tokens=1000, accelerator_seconds=50.0)
    found = comparison(samples("sft"), one, two, budget=budget, reward_accuracy=0.9)
    cost = found.candidate("ppo").cost
    assert (cost.gradient_tokens, cost.generated_tokens, cost.seconds, cost.accelerator_seconds) == (200, 40, 20, 40)
    assert cost.share(budget) == 0.8
    assert cost.share(Budget()) == 0
    assert found.candidate("ppo").preference_accuracy == pytest.approx(0.7)
    assert (found.candidate("sft").cost, found.candidate("sft").preference_accuracy) == (None, None)
    assert (found.budget, found.reward_accuracy) == (budget, 0.9)


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
