"""Bad curves are named while they run; healthy ones, noisy ones and short ones are left alone."""

import math

import numpy as np
import pytest

from rlhf.report.diagnosis import diagnose_curve, windows


def rows(**columns):
    length = len(next(iter(columns.values())))
    return [
        {"step": place + 1.0, **{name: float(column[place]) for name, column in columns.items()}}
        for place in range(length)
    ]


def wandering(rng, steps, size, memory):
    """Return noise that forgets slowly (autoregressive), with standard deviation `size`."""
    noise = rng.normal(0, size * math.sqrt(1 - memory**2), steps)
    for place in range(1, steps):
        noise[place] += memory * noise[place - 1]
    return noise


def online(seed=0, steps=64, memory=0.0, **bad):
    """Return the curve of a healthy run on rollouts, noisy, with some columns replaced."""
    rng = np.random.default_rng(seed)
    done = 1 - np.exp(-3 * np.arange(steps) / steps)
    columns = {
        "reward": done + wandering(rng, steps, 0.1, memory),
        "gold": 0.6 * done + wandering(rng, steps, 0.08, memory),
        "kl": 8 * done * np.exp(wandering(rng, steps, 0.2, memory)),
        "entropy": 1.5 - done + wandering(rng, steps, 0.05, memory),
        "length": 14 + 2 * done + wandering(rng, steps, 1.0, memory),
        "explained_variance": 0.5 * done - 0.1 + wandering(rng, steps, 0.2, memory),
        "unfinished": np.clip(0.1 + wandering(rng, steps, 0.1, memory), 0, 1),
        "flat_groups": np.clip(0.3 + wandering(rng, steps, 0.1, memory), 0, 1),
    }
    return rows(**(columns | bad))


def names(kind, curve):
    return [item.name for item in diagnose_curve(kind, curve)]


@pytest.mark.parametrize("memory", [0.0, 0.5, 0.8])
def test_a_healthy_noisy_run_is_left_alone_however_often_one_asks(memory):
    for seed in range(40):
        curve = online(seed, memory=memory)
        for step in range(1, len(curve) + 1, 3):
            assert diagnose_curve("ppo", curve[:step]) == [], f"seed {seed}, step {step}"


def test_a_healthy_dpo_run_is_left_alone():
    for seed in range(40):
        rng, step = np.random.default_rng(seed), np.arange(60) / 60
        chosen, rejected = rng.normal(0.5 * step, 0.3), rng.normal(-1.5 * step, 0.3)
        curve = rows(
            margin=chosen - rejected,
            chosen_reward=chosen,
            rejected_reward=rejected,
            chosen_logprob=-20 + rng.normal(0, 3, 60),
        )
        assert diagnose_curve("dpo", curve) == []
        assert diagnose_curve("simpo", curve) == []


def test_gold_that_falls_while_the_reward_rises_is_hacking_and_worth_a_stop():
    step = np.arange(64)
    rng = np.random.default_rng(0)
    gold = np.exp(-(((step - 32) / 14) ** 2)) + rng.normal(0, 0.05, 64)
    curve = online(gold=gold, reward=step / 30 + rng.normal(0, 0.1, 64))
    (found,) = diagnose_curve("ppo", curve)
    assert (found.name, found.severity) == ("reward hacking", "stop")
    assert "around step 29" in found.evidence or "around step 37" in found.evidence
    assert "save_every" in found.advice
    first = next(n for n in range(1, 65) if names("ppo", curve[:n]))
    assert 36 <= first <= 54
    assert diagnose_curve("ppo", curve[:first])[0].severity == "warn"


def test_gold_and_reward_that_fall_together_are_not_hacking():
    hump = np.exp(-(((np.arange(64) - 32) / 14) ** 2))
    assert "reward hacking" not in names("ppo", online(gold=hump, reward=2 * hump))


def test_a_kl_above_a_nat_a_token_stops_a_run_that_gains_nothing_and_warns_one_that_does():
    step = np.arange(64)
    far = 0.6 * step
    (found,) = diagnose_curve("grpo", online(kl=far, reward=np.ones(64)))
    assert (found.name, found.severity) == ("KL blow-up", "stop")
    assert "nats a token" in found.evidence
    (found,) = diagnose_curve("grpo", online(kl=far, reward=step / 60))
    assert (found.name, found.severity) == ("KL blow-up", "warn")


def test_a_kl_that_runs_off_is_named_before_and_one_that_drifts_is_not():
    step = np.arange(64)
    assert names("ppo", online(kl=13 * (step / 63) ** 4)) == ["KL speeds up"]
    assert names("ppo", online(kl=13 * step / 63)) == []
    assert names("ppo", online(kl=13 * (step / 63) ** 2)) == []


def test_entropy_that_collapses_warns_and_stops_when_the_reward_is_lost_with_it():
    step = np.arange(64)
    faint = 1.5 * np.exp(-step / 12)
    (found,) = diagnose_curve("rloo", online(entropy=faint))
    assert (found.name, found.severity) == ("entropy collapse", "warn")
    lost = np.where(step < 40, step / 40, 0.2) + 0.01 * (-1.0) ** step
    (found,) = diagnose_curve("rloo", online(entropy=faint, reward=lost))
    assert (found.name, found.severity) == ("entropy collapse", "stop")
    assert "the reward fell from" in found.evidence


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"explained_variance": [-4.7, -3.1, -2.2]}, "its explained variance was -3.33"),
        (
            {"explained_variance": [0.2] * 3, "value": [-2.4, -2, -1.6], "return": [-0.7] * 3, "reward_std": [0.8] * 3},
            "its mean value was -2.40 where returns were -0.70 at first",
        ),
    ],
)
def test_a_critic_that_begins_far_off_is_named_at_its_third_step(columns, said):
    curve = rows(**columns)
    assert names("ppo", curve[:2]) == []
    (found,) = diagnose_curve("ppo", curve)
    assert (found.name, found.severity) == ("the critic began far from the returns", "warn")
    assert said in found.evidence
    assert "critic_start: fitted" in found.advice
    later = rows(**{name: [*column, *column[-1:] * 3] for name, column in columns.items()})
    assert found in diagnose_curve("ppo", later)


def test_a_critic_as_good_as_a_constant_is_left_alone_at_first():
    fair = {"value": [0.1, 0.3, 0.2], "return": [0.0, 0.1, 0.5], "reward_std": [1.0] * 3}
    assert names("ppo", rows(explained_variance=[-0.2, -0.4, 0.0], **fair)) == []
    assert names("ppo", rows(explained_variance=[-2.0, 0.1, 0.2], **fair)) == []


def test_a_critic_that_explains_nothing_late_is_named_one_that_only_starts_so_is_not():
    rng = np.random.default_rng(0)
    assert names("ppo", online(explained_variance=rng.normal(-0.3, 0.1, 64))) == ["the critic explains nothing"]
    late = np.where(np.arange(64) < 24, -0.8, 0.4)
    assert names("ppo", online(explained_variance=late)) == []


def test_a_falling_chosen_response_is_named_with_the_rejected_one():
    rng, step = np.random.default_rng(0), np.arange(48)
    chosen, rejected = -0.02 * step + rng.normal(0, 0.05, 48), -0.1 * step + rng.normal(0, 0.05, 48)
    curve = rows(chosen_reward=chosen, rejected_reward=rejected, margin=chosen - rejected)
    (found,) = diagnose_curve("dpo", curve)
    assert (found.name, found.severity) == ("the chosen responses become less likely", "warn")
    assert "(rejected: -0.2" in found.evidence
    logprobs = rows(chosen_logprob=-20 + 10 * chosen, rejected_logprob=-20 + 10 * rejected, margin=chosen - rejected)
    assert names("orpo", logprobs) == ["the chosen responses become less likely"]
    still = rows(chosen_reward=chosen, rejected_reward=rejected, margin=0.0 * step)
    assert diagnose_curve("dpo", still) == []


@pytest.mark.parametrize(("factor", "expected"), [(1.3, []), (2.0, ["length drift"]), (0.4, ["length drift"])])
def test_length_drift_is_half_as_long_again(factor, expected):
    rng = np.random.default_rng(0)
    assert names("ppo", online(length=20 * np.linspace(1, factor, 64) + rng.normal(0, 0.5, 64))) == expected


def test_flat_groups_and_missing_ends_are_named():
    rng = np.random.default_rng(0)
    assert names("grpo", online(flat_groups=np.clip(rng.normal(0.9, 0.05, 64), 0, 1))) == ["flat groups"]
    (found,) = diagnose_curve("ppo", online(unfinished=np.linspace(0, 0.95, 64)))
    assert found.name == "missing end of sequence"
    assert "% at first" in found.evidence


def test_short_or_empty_curves_say_nothing():
    curve = online(kl=np.linspace(0, 500, 64), reward=np.ones(64))
    assert diagnose_curve("ppo", curve[:15]) == []
    assert diagnose_curve("ppo", curve[:16]) != []
    assert diagnose_curve("ppo", []) == []
    assert diagnose_curve("dpo", [{"step": float(place), "kl": math.nan} for place in range(30)]) == []


def test_windows_hold_every_point_and_take_the_noise_from_neighbours():
    found = windows(rows(kl=np.arange(27.0)), "kl")
    # 27 points, windows of 3; nothing is left over.
    assert len(found) == 9
    assert [found[0].mean, found[-1].mean] == [1.0, 25.0]
    assert found[0].error == pytest.approx(math.sqrt(0.5) / math.sqrt(3))
    assert len(windows(rows(kl=np.arange(29.0)), "kl")) == 9
    assert windows(rows(kl=np.arange(29.0)), "kl")[0].mean == 2.0
