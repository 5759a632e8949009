"""Prompts that a reward service lost, on their way through a step: what is learnt, drawn again, paired and compared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from online_made import Echo, Pupil, context_of, prompts_of, stage_of

from rlhf.errors import GuardError, RecipeError, TrainingError
from rlhf.recipe.base import FunctionJudge, HttpJudge, PathData
from rlhf.recipe.stage_schema import CompareStage
from rlhf.rewards.remote import HttpReward
from rlhf.roles import Ready, Roles
from rlhf.stages.experience import collect, measure
from rlhf.stages.online_draw import draw
from rlhf.stages.policy_gradient import PolicyGradient, start_estimator
from rlhf.types import TokenScores

JUDGE = HttpJudge(kind="http", url="http://127.0.0.1:9", on_error="skip_group", max_skipped=0.5)


class Lossy(HttpReward):
    """A service's reward that has no scores for some prompts; a score is the number of tokens."""

    def __init__(self, *lost: str, judge: HttpJudge = JUDGE) -> None:
        super().__init__(judge)
        self.lost, self.failure = lost, "status 500"

    def score(self, rollouts: Any) -> Any:
        return Ready(torch.tensor([math.nan if r.prompt.id in self.lost else float(len(r.tokens)) for r in rollouts]))


class Said(Pupil):
    """A policy, reference and critic with constant logprobs; `spoilt` is the row and column of a NaN."""

    spoilt: tuple[int, int] | None = None

    def logprobs(self, batch: Any) -> Any:
        scores = torch.full(batch.tokens.shape, -1.0).masked_fill(~batch.response_mask, 0)
        if self.spoilt:
            scores[self.spoilt] = math.nan
        return Ready(TokenScores(scores, -scores))


def collected(tmp_path, source, stage, reference=None):
    roles = Roles(Said(), reference or Said(), source, Echo())
    drawn = draw(roles, prompts_of(6), 0, stage, context_of(stage, tmp_path))
    return collect(roles, Said(), drawn.rollouts, drawn.score, 0, stage), drawn


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dr_grpo", "reinforce_pp"])
def test_the_others_are_learnt_from_as_if_the_lost_had_not_been_drawn(tmp_path, kind):
    stage = stage_of(kind, reward=JUDGE, prompts_per_step=4, minibatch_size=4)
    whole, _ = collected(tmp_path, Lossy(), stage)
    ids = [rollout.prompt.id for rollout in whole.rollouts[::3]]
    scored, drawn = collected(tmp_path, Lossy(ids[1]), stage)
    rows = [0, 1, 2, 6, 7, 8, 9, 10, 11]
    assert len(drawn.rollouts) == 12
    assert [rollout.prompt.id for rollout in scored.rollouts] == [drawn.rollouts[row].prompt.id for row in rows]
    assert scored.groups.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert scored.raw_scores.tolist() == whole.raw_scores[rows].tolist()
    assert torch.equal(scored.batch.tokens, whole.batch.tokens[rows])
    assert torch.equal(scored.old.logprobs, whole.old.logprobs[rows])
    metrics = measure(scored, compares_samples=True)
    assert (metrics["skipped_groups"], metrics["reward"]) == (1, 2)
    policy, context = Said(), context_of(stage, tmp_path)
    PolicyGradient(stage, context, policy, start_estimator(stage, context)).learn(scored, 0, 10)
    ((experience, _, minibatches, _),) = policy.lessons
    assert [len(rows) for rows in minibatches] == [4, 4, 1]
    assert experience.advantages.isfinite().all()


def test_whitening_leaves_the_lost_out(tmp_path):
    stage = stage_of("grpo", reward=JUDGE, whiten_scores=True, missing_eos_penalty=0)
    ids = [rollout.prompt.id for rollout in collected(tmp_path, Lossy(), stage)[0].rollouts]
    scored, _ = collected(tmp_path, Lossy(ids[0]), stage)
    torch.testing.assert_close(scored.scores, (torch.tensor([1.0, 2, 3]) - 2) / math.sqrt(2 / 3))


def test_too_many_lost_end_the_run_with_what_the_service_said(tmp_path):
    stage = stage_of("grpo", reward=JUDGE, prompts_per_step=2)
    with pytest.raises(TrainingError, match=r"2 of 2 prompts have no scores \(max_skipped 0.5\): status 500"):
        collected(tmp_path, Lossy(*(f"p{n}" for n in range(6))), stage)


def test_dynamic_sampling_draws_others_in_place_of_the_lost(tmp_path):
    stage = stage_of("grpo", reward=JUDGE, prompts_per_step=3, redraws=2)
    first = [rollout.prompt.id for rollout in collected(tmp_path, Lossy(), stage)[1].rollouts[::3]]
    scored, drawn = collected(tmp_path, Lossy(first[0]), stage)
    assert [rollout.prompt.id for rollout in drawn.rollouts[:6:3]] == first[1:]
    assert drawn.rollouts[6].prompt.id not in first
    assert (drawn.metrics["skipped_groups"], drawn.metrics["redrawn"]) == (1, 1)
    assert drawn.tokens == 4 * 6
    assert scored.scores.isfinite().all()
    assert measure(scored, True).merge(drawn.metrics).sums["skipped_groups"][0] == 1


def test_what_a_role_says_must_be_finite_in_the_response_and_nowhere_else(tmp_path):
    stage = stage_of("grpo", reward=JUDGE)
    spoilt = Said()
    spoilt.spoilt = (3, 4)  # the fourth row has 2 prompt tokens and one response token
    collected(tmp_path, Lossy(), stage, spoilt)
    spoilt.spoilt = (3, 2)
    with pytest.raises(GuardError, match=r"what the reference says of a response to prompt id p\d is not finite"):
        collected(tmp_path, Lossy(), stage, spoilt)


def test_a_comparison_is_complete_or_none(tmp_path):
    stage = CompareStage(
        name="duel", kind="compare", candidates=["base", "x"], baseline="base", prompts=PathData(path="p"), gold=JUDGE
    )
    online = context_of(stage_of("grpo", reward=JUDGE), tmp_path)
    assert online.judge(JUDGE, 0).skips
    assert not replace(online, stage=stage).judge(JUDGE, 0).skips


def test_the_limit_of_a_function_is_the_recipes(tmp_path):
    (tmp_path / "r.py").write_text("def f(p, r, m):\n    return 1\n")
    judge = FunctionJudge(kind="function", path=f"{tmp_path}/r.py:f", timeout_s=3)
    source = context_of(stage_of("grpo"), tmp_path).judge(judge, 0)
    assert [process.timeout_s for process in source.processes if process] == [3]
    with pytest.raises(RecipeError, match="has no function 'g'"):
        context_of(stage_of("grpo"), tmp_path).judge(judge.model_copy(update={"path": f"{tmp_path}/r.py:g"}), 0)
