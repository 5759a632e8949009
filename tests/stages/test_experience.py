"""Scores on their way to the loss, and what is measured of a step."""

import math
from dataclasses import replace

import pytest
import torch
from online_made import scored_of, stage_of

from rlhf.recipe.online_schema import Overlong
from rlhf.stages.experience import group_numbers, measure, shaped
from rlhf.stages.online_step import check_learned, check_step
from rlhf.types import Metrics

RAW = torch.tensor([9.0, 1.0, -9.0, 2.0])
LENGTHS = torch.tensor([4, 3, 2, 1])
UNFINISHED = torch.tensor([True, False, False, False])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [5 - 1, 1, -5, 2]),
        ({"score_clip": 1.5, "missing_eos_penalty": 0.25}, [1.25, 1, -1.5, 1.5]),
        ({"overlong": Overlong(buffer=2, penalty=0.5)}, [5 - 1 - 0.5, 1 - 0.25, -5, 2]),
    ],
)
def test_scores_are_clipped_and_then_penalised(settings, expected):
    assert shaped(RAW, LENGTHS, UNFINISHED, stage_of("grpo", **settings)).tolist() == expected


def test_whitening_comes_after_the_clip_and_before_the_penalties():
    # clipped 5, 1, -5, 2: mean 0.75, variance (4.25^2 + 0.25^2 + 5.75^2 + 1.25^2) / 4 = 13.1875
    found = shaped(RAW, LENGTHS, UNFINISHED, stage_of("ppo", whiten_scores=True))
    expected = (torch.tensor([5.0, 1.0, -5.0, 2.0]) - 0.75) / math.sqrt(13.1875) - torch.tensor([1.0, 0, 0, 0])
    torch.testing.assert_close(found, expected)


def test_groups_are_numbered_by_prompt():
    assert group_numbers(6, stage_of("grpo")).tolist() == [0, 0, 0, 1, 1, 1]


def test_measured_by_hand():
    """6 rows of 1, 2, 3, 1, 2, 3 response tokens: 12 in all, each with KL 0.5; the second group's scores are equal."""
    scored = replace(
        scored_of([1, 2, 3, 4, 4, 4], kl=0.5), unfinished=torch.tensor([True, False, False, False, False, True])
    )
    metrics = measure(scored, compares_samples=True)
    expected = {
        "reward": 3,
        "kl": 1,
        "length": 2,
        "unfinished": 1 / 3,
        "entropy": 1,
        "agreement": 0,
        "flat_groups": 0.5,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["reward_std"] == pytest.approx(math.sqrt((4 + 1 + 0 + 3) / 5))
    assert "flat_groups" not in measure(scored, compares_samples=False)


def test_padding_with_garbage_changes_nothing_that_is_measured():
    scored = scored_of([1, 2, 3, 4, 4, 4], kl=0.5)
    mask = scored.batch.response_mask
    bad = torch.full(mask.shape, float("nan"))
    spoilt = replace(
        scored,
        ref_logprobs=torch.where(mask, scored.ref_logprobs, bad),
        batch=replace(scored.batch, rollout_logprobs=torch.where(mask, scored.batch.rollout_logprobs, bad)),
    )
    assert dict(measure(spoilt, True)) == dict(measure(scored, True))


def test_guards_name_the_method_s_own_remedy():
    metrics = Metrics.of(1, agreement=0.0, kl=101.0)
    with pytest.raises(Exception, match="raise kl_coef"):
        check_step(metrics, 0, stage_of("rloo"))
    with pytest.raises(Exception, match="raise beta"):
        check_step(metrics, 0, stage_of("online_dpo"))


def test_a_step_whose_gradients_were_all_skipped_stops_the_run():
    check_learned(Metrics.of(1, pairs=0))
    check_learned(Metrics.of(2, skipped_steps=1))
    with pytest.raises(Exception, match="gradient of the policy"):
        check_learned(Metrics.of(2, skipped_steps=2))
    with pytest.raises(Exception, match=r"gradient of the critic .* critic_optimizer"):
        check_learned(Metrics.of(2, skipped_steps=0, critic_skipped_steps=2))
