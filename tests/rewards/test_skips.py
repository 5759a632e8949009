"""What stands between scores and learning: whole prompts are left out where that is allowed, all else stops."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.errors import GuardError, TrainingError
from rlhf.recipe.base import HttpJudge
from rlhf.rewards.remote import HttpReward
from rlhf.rewards.skips import Skips
from rlhf.types import Prompt, Rollout

NAN = math.nan
ROLLOUTS = [Rollout(Prompt(name, (1,), "q"), (1,), (0.0,), "r", "stop", 0, 0) for name in "aabbccdd"]


def service(max_skipped: float = 0.5, on_error: str = "skip_group") -> HttpReward:
    source = HttpReward(HttpJudge(kind="http", url="http://127.0.0.1", on_error=on_error, max_skipped=max_skipped))
    source.failure = "http://127.0.0.1: status 500: out of memory"
    return source


def test_a_prompt_that_lost_one_sample_is_left_out_whole():
    skips = Skips(service())
    assert skips.kept(torch.tensor([1.0, 2, NAN, 0.5, 3, 4, 5, NAN]), ROLLOUTS) == [0, 1, 4, 5]
    assert dict(skips.metrics()) == {"skipped_groups": 2}


def test_nothing_is_left_out_without_need():
    skips = Skips(service())
    assert skips.kept(torch.zeros(8), ROLLOUTS) == list(range(8))
    assert dict(skips.metrics()) == {"skipped_groups": 0}


@pytest.mark.parametrize(("lost", "allowed"), [(1, 0.25), (2, 0.5), (3, 0.75)])
def test_up_to_the_limit_prompts_may_be_lost_and_above_it_the_service_is_quoted(lost, allowed):
    scores = torch.tensor([NAN] * (2 * lost) + [1.0] * (8 - 2 * lost))
    assert len(Skips(service(allowed)).kept(scores, ROLLOUTS)) == 8 - 2 * lost
    with pytest.raises(TrainingError) as error:
        Skips(service(allowed - 0.01)).kept(scores, ROLLOUTS)
    assert str(error.value) == (
        f"{lost} of 4 prompts have no scores (max_skipped {allowed - 0.01:g}): "
        "http://127.0.0.1: status 500: out of memory"
    )


def test_losing_everything_is_an_error_whatever_the_limit():
    with pytest.raises(TrainingError, match="4 of 4 prompts have no scores"):
        Skips(service(1.0)).kept(torch.full((8,), NAN), ROLLOUTS)


def test_the_share_is_of_all_prompts_so_far():
    skips = Skips(service(0.25))
    skips.kept(torch.zeros(8), ROLLOUTS)
    assert skips.kept(torch.full((2,), NAN), ROLLOUTS[:2]) == []
    with pytest.raises(TrainingError, match="2 of 6 prompts"):
        skips.kept(torch.full((2,), NAN), ROLLOUTS[:2])


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("source", [service(on_error="fail"), object()])
def test_a_score_that_is_not_finite_stops_whatever_gave_it(source, value):
    skips = Skips(source)
    assert skips.metrics() == {}
    with pytest.raises(GuardError, match=rf"response to prompt id c is {value}; nothing was learnt"):
        skips.kept(torch.tensor([0.0] * 5 + [value] + [0.0] * 2), ROLLOUTS)


def test_infinity_is_no_lost_score():
    with pytest.raises(GuardError, match="prompt id a is inf"):
        Skips(service()).kept(torch.tensor([math.inf] + [0.0] * 7), ROLLOUTS)
