"""Held-out curves: those that turn are named with their step, those that are only noisy are left alone."""

import numpy as np
import pytest

from rlhf.report.diagnosis import diagnose_curve, diagnose_end

STEPS = 120


def wandering(rng, count, size, memory):
    """Return noise that forgets slowly (autoregressive), with standard deviation `size`."""
    noise = rng.normal(0, size * np.sqrt(1 - memory**2), count)
    for place in range(1, count):
        noise[place] += memory * noise[place - 1]
    return noise


def curve(rng, evaluations, train, heldout, train_noise=0.1, heldout_noise=0.02, memory=0.0):
    """Return a stage's rows: `train` and `heldout` give the losses at a share of its steps."""
    noise = wandering(rng, STEPS, train_noise, memory), wandering(rng, STEPS + 1, heldout_noise, memory)
    rows = [{"step": 0.0, "heldout_loss": heldout(0.0) + noise[1][0]}]
    for step in range(1, STEPS + 1):
        row = {"step": float(step), "loss": train(step / STEPS) + noise[0][step - 1]}
        if step % (STEPS // evaluations) == 0:
            row["heldout_loss"] = heldout(step / STEPS) + noise[1][step]
        rows.append(row)
    return rows


def alarm(rows):
    """Return the step at which overfitting is first said, asked after every evaluation; None where it never is."""
    for end in range(1, len(rows) + 1):
        if "heldout_loss" in rows[end - 1] and "overfitting" in [d.name for d in diagnose_curve("sft", rows[:end])]:
            return rows[end - 1]["step"]
    return None


def alarms(count, evaluations, train, heldout, **noise):
    made = (curve(np.random.default_rng(seed), evaluations, train, heldout, **noise) for seed in range(count))
    return sum(alarm(rows) is not None for rows in made)


def flat(share):
    return 1.0


def falling(share):
    return 1 + np.exp(-4 * share)


def plateau(share):
    return 1 + np.exp(-8 * share)


@pytest.mark.parametrize("evaluations", [3, 5, 10, 20])
def test_noise_alone_is_no_alarm(evaluations):
    assert alarms(60, evaluations, flat, flat, heldout_noise=0.1) == 0
    assert alarms(60, evaluations, falling, falling, heldout_noise=0.05) == 0
    # A held-out loss that stays where it is, though training goes on, in twenty looks at each of sixty noisy curves.
    assert alarms(60, evaluations, lambda share: 2 - 1.5 * share, plateau, heldout_noise=0.03) <= 1
    # Noise that lasts looks like a trend, to anybody.
    assert alarms(60, evaluations, flat, flat, heldout_noise=0.05, memory=0.8) <= 2


@pytest.mark.parametrize(("evaluations", "least"), [(3, 36), (5, 40), (10, 40), (20, 40)])
def test_a_turn_is_seen(evaluations, least):
    def turning(share):
        return 1.2 + 2.5 * (share - 0.35) ** 2

    assert alarms(40, evaluations, lambda share: 2 - 1.7 * share, turning) >= least


def test_the_words_name_the_step_and_the_model_that_stays():
    rng = np.random.default_rng(0)
    rows = curve(rng, 6, lambda share: 2 - 1.7 * share, lambda share: 1.2 + 2.5 * abs(share - 0.5), heldout_noise=0)
    (found,) = diagnose_curve("sft", rows)
    assert (found.name, found.severity) == ("overfitting", "warn")
    assert "fell to 1.20 at step 60 and is now 2.45" in found.evidence
    assert "overfitting since step 60" in found.evidence
    assert "leaves the model of step 60" in found.advice
    assert alarm(rows) == 100


def test_a_loss_that_only_rises_is_named_with_the_least_bad_step():
    rng = np.random.default_rng(0)
    (found,) = diagnose_curve(
        "dpo", curve(rng, 4, lambda share: 0.69 - 0.6 * share, lambda share: 0.69 + share, 0.02, 0)
    )
    assert "was 0.69 before training" in found.evidence
    assert "leaves the model of step 30" in found.advice


def test_both_rising_is_another_matter():
    rng = np.random.default_rng(0)
    assert diagnose_curve("sft", curve(rng, 6, lambda share: 1 + share, lambda share: 1 + share)) == []


def test_losses_that_hardly_fall_are_named_at_the_end_and_not_before():
    rng = np.random.default_rng(0)
    rows = curve(rng, 3, lambda share: 2 - 0.02 * share, lambda share: 2 - 0.02 * share, 0.03, 0.005)
    assert diagnose_curve("sft", rows) == []
    (found,) = diagnose_end(rows)
    assert (found.name, found.severity) == ("underfitting", "warn")
    assert (
        "In 120 steps the training loss went from 1.99 to 1.98 and the held-out loss from 2.00 to 1.99"
        in found.evidence
    )
    assert "higher learning rate" in found.advice


@pytest.mark.parametrize("noise", [0.03, 0.5])
def test_learning_and_noise_too_large_to_tell_are_not_underfitting(noise):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        assert diagnose_end(curve(rng, 3, falling, falling, noise, noise / 10)) == []
    if noise == 0.5:
        rows = curve(np.random.default_rng(0), 3, lambda share: 2 - 0.3 * share, lambda share: 2.0, noise, 0)
        assert diagnose_end(rows) == []


def test_short_curves_and_curves_without_held_out_rows_say_nothing():
    rng = np.random.default_rng(0)
    rows = curve(rng, 6, lambda share: 2 - 1.7 * share, lambda share: 1.2 + 2.5 * (share - 0.4) ** 2)
    assert diagnose_curve("sft", rows[:15]) == diagnose_end(rows[:15]) == diagnose_end([]) == []
    bare = [{name: value for name, value in row.items() if name != "heldout_loss"} for row in rows]
    assert diagnose_curve("sft", bare) == diagnose_end(bare) == []
