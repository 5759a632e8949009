"""Findings about methods appear when the numbers show them, quote them, and stay away otherwise."""

import pytest
from made import comparison, samples

from rlhf.report.findings import diagnose
from rlhf.report.frontier import frontier_point


def findings(**candidate):
    return diagnose(comparison(samples("sft"), samples("ppo", **candidate)), {})


def test_a_plain_success_has_no_findings():
    assert findings(gold=1.0, reward=1.0, kl=6.0) == []


def test_reward_up_and_gold_down_is_reward_hacking():
    (found,) = findings(gold=-0.5, reward=1.5, kl=6.0)
    assert (found.subject, found.severity) == ("ppo", "stop")
    assert str(found).startswith("ppo: reward hacking")
    assert "+1.50 [" in found.evidence
    assert "-0.50 [" in found.evidence
    assert "Try: stop earlier" in str(found)


def test_reward_up_and_gold_unclear_is_not_called_hacking():
    (found,) = findings(gold=0.0, reward=1.5, kl=6.0, noise=0.3)
    assert "does not show in gold" in found.name


def test_gold_down_without_reward_up_is_simply_worse():
    (found,) = findings(gold=-0.5, reward=-0.5, kl=6.0)
    assert str(found).startswith("ppo: worse than sft")


@pytest.mark.parametrize(("kl", "words"), [(0.0, "hardly moved"), (5.0, "did move away")])
def test_differences_not_told_from_chance_mean_nothing_learned(kl, words):
    (found,) = findings(kl=kl)
    assert found.name == "learned nothing that shows"
    assert words in found.evidence


def test_runs_that_end_far_apart_are_no_sign_that_nothing_was_learned():
    sft = samples("sft")
    runs = [samples(f"grpo@{seed}", gold=gold, kl=20.0) for seed, gold in ((1, -0.4), (2, 0.5), (3, 0.1))]
    (found,) = [item for item in diagnose(comparison(sft, *runs), {}) if item.subject == "grpo"]
    assert found.name == "too few seeds for runs this far apart"
    assert "Gold of its runs: -0.32, 0.58, 0.18, at KL 20.0 nats" in found.evidence


def test_without_a_proxy_gold_speaks_alone():
    sft, worse, idle = (samples(name, gold=gold, reward=None) for name, gold in (("a", 0.0), ("b", -1.0), ("c", 0.0)))
    found = diagnose(comparison(sft, worse, idle), {})
    assert [item.name for item in found] == ["worse than a", "learned nothing that shows"]
    assert not any("reward model" in item.evidence for item in found)


def test_the_baseline_is_not_judged_against_itself():
    assert diagnose(comparison(samples("sft", kl=500.0, finish="length", text="same")), {}) == []


@pytest.mark.parametrize(("kl", "expected"), [(19.0, 0), (30.0, 1)])
def test_kl_blow_up_is_above_one_nat_a_token(kl, expected):
    found = [item for item in findings(gold=1.0, reward=1.0, kl=kl, tokens=20) if item.name == "KL blow-up"]
    assert len(found) == expected
    assert all("1.50 nats a token" in item.evidence for item in found)


@pytest.mark.parametrize(("tokens", "expected"), [(22, []), (30, ["long"]), (10, ["short"])])
def test_length_drift_is_a_fifth_of_the_baseline(tokens, expected):
    found = [item for item in findings(gold=1.0, reward=1.0, kl=2.0, tokens=tokens) if item.name == "length drift"]
    assert len(found) == len(expected)
    assert all(f"prefers {word} answers" in item.advice for item, word in zip(found, expected, strict=True))


def test_cut_off_responses_and_collapse_are_named():
    found = findings(gold=1.0, reward=1.0, kl=2.0, finish="length", text="great great great")
    assert any("100% of the responses hit the token limit (0% for sft)" in item.evidence for item in found)
    assert any("Only 4% of the responses are distinct (100% for sft)" in item.evidence for item in found)


def test_few_prompts_allow_no_claim_about_candidates():
    few = comparison(samples("sft", prompts=4), samples("ppo", gold=-5.0, reward=5.0, kl=90.0, prompts=4))
    (found,) = diagnose(few, {})
    assert str(found).startswith("few prompts. Only 4 prompt(s)")


def test_gold_that_falls_along_the_checkpoints_while_the_proxy_rises_is_hacking():
    def along(last):
        steps = ((10, 0.5, 0.5), (20, 1.5, 1.0), (30, last, 2.0))
        return [
            frontier_point("ppo@1", samples("ppo@1", gold=gold, reward=reward, kl=step / 5).samples, step)
            for step, gold, reward in steps
        ]

    def told(last, final):
        runs = [samples("ppo@1", gold=final, reward=3.0, kl=8.0), samples("ppo@2", gold=final, reward=3.0, kl=8.0)]
        return diagnose(comparison(samples("sft"), *runs, frontier=along(last)), {})

    (found,) = told(0.6, 0.5)
    assert (found.subject, found.severity) == ("ppo@1", "stop")
    assert "gold peaks at 1.5" in found.evidence
    assert "at step 20, KL 4" in found.evidence
    assert told(1.4, 1.4) == []


def test_curves_are_read_under_the_kind_of_their_method():
    curve = [
        {"step": float(i), "margin": i / 5, "chosen_logprob": -20.0, "chosen_reward": -i / 10, "flat_groups": 1.0}
        for i in range(40)
    ]
    found = diagnose(comparison(samples("sft"), samples("dpo", gold=1.0, reward=1.0)), {"dpo": curve, "other@2": curve})
    assert [(item.subject, item.name) for item in found] == [
        ("dpo", "the chosen responses become less likely"),
        ("dpo", "flat groups"),
        ("other@2", "the chosen responses become less likely"),
        ("other@2", "flat groups"),
    ]
