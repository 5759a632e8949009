"""A step's rollouts, and dynamic sampling in place of groups whose scores are all equal."""

from itertools import pairwise

import pytest
from online_made import Echo, FlatOn, context_of, prompts_of, roles_of, stage_of

from rlhf.errors import GuardError
from rlhf.stages.online_draw import draw


def drawn(tmp_path, prompts, *flat, step=0, engine=None, **settings):
    engine, reward = engine or Echo(version=step), FlatOn(*flat)
    stage = stage_of("grpo", **settings)
    context = context_of(stage, tmp_path)
    result = draw(roles_of(reward, engine), prompts_of(prompts), step, stage, context)
    return result, engine, reward, context


def ids(result, per_prompt=3):
    """The prompts of the rollouts; every prompt's samples must stand together."""
    found = [rollout.prompt.id for rollout in result.rollouts]
    groups = [found[row : row + per_prompt] for row in range(0, len(found), per_prompt)]
    assert all(len(set(group)) == 1 for group in groups)
    assert all(a != b for a, b in pairwise(group[0] for group in groups))
    return [group[0] for group in groups]


def test_without_redraws_nothing_is_scored_before_it_is_asked_for(tmp_path):
    result, engine, reward, context = drawn(tmp_path, 6)
    assert (len(engine.asked), reward.calls) == (1, [])
    assert ids(result) == engine.asked[0]
    assert result.score().result().tolist() == [1, 2, 3, 1, 2, 3]
    assert (result.tokens, context.tracker.generated_tokens, dict(result.metrics)) == (12, 12, {})
    seeds = [rollout.seed for rollout in result.rollouts]
    assert len(set(seeds)) == 6
    again, *_ = drawn(tmp_path, 6)
    assert [rollout.seed for rollout in again.rollouts] == seeds


def test_every_prompt_has_its_turn(tmp_path):
    seen = [name for step in range(3) for name in ids(drawn(tmp_path, 6, step=step)[0])]
    assert sorted(seen) == [f"p{row}" for row in range(6)]


def test_rollouts_of_old_weights_are_refused(tmp_path):
    with pytest.raises(GuardError, match=r"served weight versions \[0\], the policy is at 2"):
        drawn(tmp_path, 6, step=2, engine=Echo(version=0))


def test_a_flat_group_is_replaced_by_one_of_a_further_prompt(tmp_path):
    first = ids(drawn(tmp_path, 6)[0])
    result, engine, reward, context = drawn(tmp_path, 6, first[1], redraws=3)
    kept = ids(result)
    assert kept[0] == first[0]
    assert kept[1] not in first
    assert engine.asked == [first, [kept[1]]]
    assert reward.calls == [6, 3]
    assert result.metrics["redrawn"] == 1
    assert result.metrics["drawn_reward"] == pytest.approx((6 + 3 + 6) / 9)
    assert result.score().result().tolist() == [1, 2, 3, 1, 2, 3]
    assert reward.calls == [6, 3]
    assert result.tokens == context.tracker.generated_tokens == 18


def test_redraws_end_when_every_group_has_spread(tmp_path):
    result, engine, _, _ = drawn(tmp_path, 6, redraws=5)
    assert len(engine.asked) == 1
    assert result.metrics["redrawn"] == 0


@pytest.mark.parametrize("redraws", [1, 2])
def test_after_the_last_redraw_flat_groups_fill_the_batch(tmp_path, redraws):
    everything = [f"p{row}" for row in range(9)]
    result, engine, reward, _ = drawn(tmp_path, 9, *everything, redraws=redraws)
    assert [len(asked) for asked in engine.asked] == [2] * (1 + redraws)
    assert len({name for asked in engine.asked for name in asked}) == 2 * (1 + redraws)
    assert ids(result) == engine.asked[0]
    assert reward.calls == [6] * (1 + redraws)
    assert result.metrics["redrawn"] == 0
    assert result.score().result().tolist() == [1] * 6


def test_redraws_end_when_there_are_no_further_prompts(tmp_path):
    result, engine, _, _ = drawn(tmp_path, 3, "p0", "p1", "p2", redraws=5)
    assert [len(asked) for asked in engine.asked] == [2, 1]
    assert len(result.rollouts) == 6


def test_scores_are_flat_where_the_clip_makes_them_equal(tmp_path):
    result, engine, _, _ = drawn(tmp_path, 6, redraws=1, score_clip=0.5)
    assert len(engine.asked) == 2
    assert result.metrics["redrawn"] == 0
