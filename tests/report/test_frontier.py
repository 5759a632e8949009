"""Findings appear when the numbers show them, quote them, and stay away otherwise."""

import math

import numpy as np
import pytest
from made import comparison, samples

from rlhf.report.frontier import diagnose


def rows(**columns):
    length = len(next(iter(columns.values())))
    return [
        {"step": place + 1.0, **{name: float(column[place]) for name, column in columns.items()}}
        for place in range(length)
    ]


def findings(curves=None, **candidate):
    return diagnose(comparison(samples("sft"), samples("ppo", **candidate)), curves or {})


def test_a_plain_success_has_no_findings():
    assert findings(gold=1.0, reward=1.0, kl=6.0) == []


def test_reward_up_and_gold_down_is_reward_hacking():
    (found,) = findings(gold=-0.5, reward=1.5, kl=6.0)
    assert found.startswith("ppo: reward hacking")
    assert "+1.50 [" in found
    assert "-0.50 [" in found
    assert "Try:" in found


def test_reward_up_and_gold_unclear_is_not_called_hacking():
    (found,) = findings(gold=0.0, reward=1.5, kl=6.0, noise=0.3)
    assert "does not show in gold" in found


def test_gold_down_without_reward_up_is_simply_worse():
    (found,) = findings(gold=-0.5, reward=-0.5, kl=6.0)
    assert found.startswith("ppo: worse than sft")


@pytest.mark.parametrize(("kl", "words"), [(0.0, "hardly moved"), (5.0, "did move away")])
def test_intervals_that_cover_zero_mean_nothing_learned(kl, words):
    (found,) = findings(kl=kl)
    assert found.startswith("ppo: learned nothing")
    assert words in found


def test_the_baseline_is_not_judged_against_itself():
    assert diagnose(comparison(samples("sft", kl=500.0, finish="length", text="same")), {}) == []


@pytest.mark.parametrize(("kl", "expected"), [(19.0, 0), (30.0, 1)])
def test_kl_blow_up_is_above_one_nat_a_token(kl, expected):
    found = [line for line in findings(gold=1.0, reward=1.0, kl=kl, tokens=20) if "KL blow-up" in line]
    assert len(found) == expected
    assert all("1.50 nats a token" in line for line in found)


@pytest.mark.parametrize(("tokens", "expected"), [(22, []), (30, ["long"]), (10, ["short"])])
def test_length_drift_is_a_fifth_of_the_baseline(tokens, expected):
    found = [line for line in findings(gold=1.0, reward=1.0, kl=2.0, tokens=tokens) if "length drift" in line]
    assert len(found) == len(expected)
    assert all(f"prefers {word} answers" in line for line, word in zip(found, expected, strict=True))


def test_cut_off_responses_and_collapse_are_named():
    found = findings(gold=1.0, reward=1.0, kl=2.0, finish="length", text="great great great")
    assert any("100% of the responses hit the token limit (0% for sft)" in line for line in found)
    assert any("collapse. Only 4% of the responses are distinct (100% for sft)" in line for line in found)


def test_few_prompts_allow_no_claim_about_candidates():
    few = comparison(samples("sft", prompts=4), samples("ppo", gold=-5.0, reward=5.0, kl=90.0, prompts=4))
    (found,) = diagnose(few, {})
    assert found.startswith("Only 4 prompt(s)")


def test_gold_that_peaks_while_reward_rises_is_over_optimisation_in_training():
    step = np.arange(40)
    wobble = 0.01 * (-1.0) ** step
    curve = rows(gold=np.exp(-(((step - 20) / 10) ** 2)) + wobble, reward=step / 10 + wobble)
    (found,) = findings({"ppo": curve}, gold=1.0, reward=1.0, kl=6.0)
    assert "over-optimisation while training" in found
    assert "around step 18" in found or "around step 23" in found


def test_noise_on_a_gold_plateau_is_not_over_optimisation():
    calls = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        curve = rows(gold=0.5 + rng.normal(0, 0.1, 40), reward=np.arange(40) / 10)
        calls += len(findings({"ppo": curve}, gold=1.0, reward=1.0, kl=6.0))
    assert calls <= 6


def test_falling_chosen_reward_of_dpo_is_reported_with_the_rejected_one():
    step = np.arange(24)
    wobble = 0.01 * (-1.0) ** step
    curve = rows(chosen_reward=-0.02 * step + wobble, rejected_reward=-0.1 * step + wobble)
    (found,) = findings({"dpo": curve}, gold=1.0, reward=1.0, kl=6.0)
    assert found.startswith("dpo: the chosen responses become less likely")
    assert "rejected: -0.10 to -2.20" in found
    rising = rows(chosen_reward=0.02 * step + wobble, rejected_reward=-0.1 * step + wobble)
    assert findings({"dpo": rising}, gold=1.0, reward=1.0, kl=6.0) == []


def test_kl_that_accelerates_and_entropy_that_collapses_are_reported_steady_ones_not():
    step = np.arange(32)
    fast, faint = 20 * (step / 31) ** 3, 0.8 * np.exp(-step / 8)
    found = findings({"ppo": rows(kl=fast, entropy=faint)}, gold=1.0, reward=1.0, kl=6.0)
    assert [word in line for line, word in zip(found, ("speeds up", "entropy collapses"), strict=True)] == [True, True]
    assert findings({"ppo": rows(kl=step / 3, entropy=0.8 - step / 80)}, gold=1.0, reward=1.0, kl=6.0) == []


def test_short_or_unfinished_curves_say_nothing():
    curve = rows(gold=[1, 0, 0], reward=[1, 2, 3], kl=[1, 50, 90])
    gaps = [{"step": float(place), "kl": math.nan} for place in range(30)]
    assert findings({"ppo": curve, "dpo": gaps}, gold=1.0, reward=1.0, kl=6.0) == []
