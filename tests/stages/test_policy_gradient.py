"""What each method makes of the same scored rollouts, and what it asks its models to learn."""

from dataclasses import replace

import pytest
import torch
from online_made import Pupil, context_of, scored_of, stage_of

from rlhf.algorithms.advantages import group_normalised, leave_one_out
from rlhf.algorithms.masked import whiten
from rlhf.algorithms.ppo import importance_weights
from rlhf.recipe.base import Optimizer
from rlhf.stages.estimators import AgainstBatch, AgainstGroup, WithCritic
from rlhf.stages.online import start_method
from rlhf.stages.online_dpo import OnlineDpo, best_against_worst
from rlhf.stages.policy_gradient import PolicyGradient, objective, start_estimator

SCORES = [1.0, 2.0, 6.0, 4.0, 4.0, 4.0]


def kl_of(scored):
    return scored.old.logprobs - scored.ref_logprobs


def lesson(tmp_path, kind, scored, step=0, **settings):
    """The one batch, objective, minibatches and rate that a critic-free method gives its policy; and its metrics."""
    stage, policy = stage_of(kind, **settings), Pupil()
    context = context_of(stage, tmp_path)
    method = PolicyGradient(stage, context, policy, start_estimator(stage, context))
    metrics = method.learn(scored, step, 10)
    assert len(policy.lessons) == 1
    return policy.lessons[0], metrics, context


@pytest.mark.parametrize(
    ("kind", "settings", "first_group"),
    [
        ("grpo", {}, [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5]),
        ("dr_grpo", {}, [-2, -1, 3]),
        ("rloo", {}, [-3, -1.5, 4.5]),
    ],
)
def test_group_methods_give_every_token_its_sequence_s_advantage(tmp_path, kind, settings, first_group):
    (batch, *_), _, _ = lesson(tmp_path, kind, scored_of(SCORES), **settings)
    expected = torch.tensor([*first_group, 0.0, 0, 0])[:, None] * batch.batch.response_mask
    torch.testing.assert_close(batch.advantages, expected, rtol=1e-4, atol=1e-6)


def test_the_kl_in_the_reward_is_taken_from_the_sequence_s_score():
    """Responses of 1, 2, 3 tokens at KL 0.5 each lose 0.1 times 0.5, 1 and 1.5 before they are compared."""
    scored = scored_of(SCORES, kl=0.5)
    estimate = AgainstGroup(leave_one_out).estimate(scored, kl_of(scored), 0.1, 0)
    totals = torch.tensor([0.95, 1.9, 5.85, 3.95, 3.9, 3.85])
    expected = leave_one_out(totals, scored.groups)
    torch.testing.assert_close(estimate.advantages[:, 2], expected)
    spoilt = kl_of(scored).masked_fill(~scored.batch.response_mask, float("nan"))
    again = AgainstGroup(leave_one_out).estimate(scored, spoilt, 0.1, 0)
    torch.testing.assert_close(again.advantages, estimate.advantages)


def test_reinforce_with_the_kl_in_each_token_s_reward_by_hand():
    """Gamma 1, one group; rewards to go 1 - 0.05, then 2 - 0.1 and 2 - 0.05, whitened over the three tokens."""
    scored = scored_of([1.0, 2.0], per_prompt=2, kl=0.5)
    estimate = AgainstBatch(1.0, "batch").estimate(scored, kl_of(scored), 0.1, 0)
    to_go = torch.tensor([[0, 0, 0.95, 0, 0], [0, 0, 1.9, 1.95, 0]])
    torch.testing.assert_close(estimate.advantages, whiten(to_go, scored.batch.response_mask))
    grouped = AgainstBatch(1.0, "group").estimate(scored, kl_of(scored), 0.1, 0)
    torch.testing.assert_close(
        grouped.advantages, whiten(to_go - torch.tensor([[1.5]]), scored.batch.response_mask), rtol=1e-5, atol=1e-6
    )


def test_group_means_matter_to_reinforce_only_between_groups():
    """With a group baseline, a prompt whose samples are all equal gets no credit for being easy."""
    scored = scored_of([1.0, 2.0, 6.0, 9.0, 9.0, 9.0])
    batch = AgainstBatch(1.0, "batch").estimate(scored, kl_of(scored), 0.0, 0).advantages
    group = AgainstBatch(1.0, "group").estimate(scored, kl_of(scored), 0.0, 0).advantages
    assert (batch[3:, 2] > 0.5).all()
    torch.testing.assert_close(group[3, 2], group[4, 2])
    assert group[0, 2] < group[1, 2] < group[3, 2] < group[2, 2]


@pytest.mark.parametrize(("kl_in", "in_loss", "shifted"), [("reward", 0.0, True), ("loss", 0.3, False)])
def test_the_kl_is_either_in_the_reward_or_in_the_loss(tmp_path, kl_in, in_loss, shifted):
    settings = {"kl_in": kl_in, "kl_coef": 0.3, "kl_estimator": "k2"}
    (batch, loss, *_), metrics, _ = lesson(tmp_path, "grpo", scored_of(SCORES, kl=2.0), **settings)
    assert (loss.kl_coef, loss.kl_estimator) == (in_loss, "k2")
    plain = group_normalised(torch.tensor(SCORES), torch.arange(6) // 3)
    assert torch.allclose(batch.advantages[:, 2], plain) != shifted
    assert batch.kl[0].tolist() == [0, 0, 2, 0, 0]
    assert metrics["kl_penalty"] == pytest.approx(0.3 * 2)


def test_every_epoch_takes_every_row_once_and_its_tokens_are_counted(tmp_path):
    (batch, _, minibatches, scale), _, context = lesson(tmp_path, "rloo", scored_of(SCORES), epochs=3)
    assert [len(rows) for rows in minibatches] == [4, 2] * 3
    assert all(sorted(minibatches[k] + minibatches[k + 1]) == list(range(6)) for k in (0, 2, 4))
    assert scale == 1
    assert context.tracker.gradient_tokens == 3 * batch.token_count() == 3 * (6 * 2 + 12)


def test_minibatches_hold_whole_prompts_where_they_can(tmp_path):
    """Then the samples of a prompt, which are laid flat with one copy of it, meet in one pass."""
    for size, whole in ((3, True), (4, False)):
        (_, _, minibatches, _), *_ = lesson(tmp_path, "rloo", scored_of(SCORES), epochs=4, minibatch_size=size)
        assert sorted(row for rows in minibatches for row in rows) == sorted(4 * list(range(6)))
        assert all(rows in ([0, 1, 2], [3, 4, 5]) for rows in minibatches) == whole


def test_where_the_trainer_was_not_asked_the_engine_s_logprobs_are_the_old_ones(tmp_path):
    """The importance weight, old over engine, is then 1, and the KL is that of the engine's numbers."""
    scored = scored_of(SCORES, kl=0.5)
    scored = replace(scored, batch=replace(scored.batch, rollout_logprobs=scored.old.logprobs * 1.25), old=None)
    (batch, loss, *_), metrics, _ = lesson(tmp_path, "rloo", scored)
    assert batch.old_logprobs is scored.batch.rollout_logprobs
    assert metrics["kl_penalty"] == pytest.approx(0.05 * (0.5 - 0.25))
    assert float(scored.kl()) == pytest.approx(12 * 0.25)
    old, mask = batch.old_logprobs, batch.batch.response_mask
    assert importance_weights(old, batch.batch.rollout_logprobs, loss.importance_cap)[mask].tolist() == [1] * 12


@pytest.mark.parametrize(("total", "scale"), [(10, 0.7), (4, 0.25)])
def test_the_learning_rate_falls_over_the_steps_that_the_budget_allows(tmp_path, total, scale):
    linear = Optimizer(learning_rate=1e-3, schedule="linear")
    for kind in ("rloo", "online_dpo"):
        stage, policy = stage_of(kind, optimizer=linear), Pupil()
        start_method(stage, context_of(stage, tmp_path), policy).learn(scored_of(SCORES), 3, total)
        assert policy.lessons[0][3] == pytest.approx(scale)


def test_ppo_trains_its_critic_on_the_same_minibatches(tmp_path):
    stage, policy, critic = stage_of("ppo", critic_start="loaded"), Pupil(), Pupil()
    context = context_of(stage, tmp_path)
    method = PolicyGradient(stage, context, policy, WithCritic(critic, stage))
    metrics = method.learn(scored_of(SCORES), 0, 10)
    (experience, _, minibatches, _), (values, loss, same, _) = policy.lessons[0], critic.lessons[0]
    assert minibatches == same
    assert loss.value_clip_range == stage.value_clip_range
    assert values.batch is experience.batch
    assert values.returns[2].tolist() == pytest.approx([0, 0, 6 * 0.95**2, 6 * 0.95, 6])
    assert critic.fitted == []
    assert (metrics["grad_norm"], metrics["critic_grad_norm"], metrics["critic_skipped_steps"]) == (2, 2, 0)
    assert {"value", "explained_variance", "kl_penalty"} <= set(metrics)
    assert "kl_coef" not in metrics
    assert context.tracker.gradient_tokens == 2 * stage.epochs * (6 * 2 + 12)


@pytest.mark.parametrize("step", [0, 1])
def test_the_critic_is_fitted_to_the_first_rewards_to_go_and_says_what_the_first_advantages_rest_on(tmp_path, step):
    """Rows of 1, 2, 3 tokens whose score comes last and KL 0.5 costs 0.1 each; the fit says 2 everywhere."""
    stage, policy, critic = stage_of("ppo", kl_coef=0.2), Pupil(), Pupil(fit=2.0)
    method = PolicyGradient(stage, context_of(stage, tmp_path), policy, WithCritic(critic, stage))
    metrics = method.learn(scored_of(SCORES, kl=0.5), step, 10)
    values = critic.lessons[0][0].values
    if step:
        assert critic.fitted == []
        assert metrics["value"] == 0
        return
    (asked,) = critic.fitted
    assert asked.returns[2].tolist() == pytest.approx([0, 0, 6 - 0.3, 6 - 0.2, 6 - 0.1])
    assert not asked.values.any()
    assert values[2].tolist() == [0, 0, 2, 2, 2]
    assert metrics["value"] == 2
    # lambda 0.95: the last token's return is its reward, the one before has a share of the error and 2 for the rest
    last, before = 6 - 0.1, 2 + (-0.1 + 2 - 2) + 0.95 * (6 - 0.1 - 2)
    assert critic.lessons[0][0].returns[2, 3:].tolist() == pytest.approx([before, last])


def test_an_adaptive_kl_coef_follows_the_sequence_kl(tmp_path):
    """KL 0.5 a token is 1 nat a sequence; target 0.5: the clipped error of 0.2 with 6 of 60 samples is 2 % more."""
    stage, policy = stage_of("rloo", kl_coef=0.1, kl_in="loss", target_kl=0.5, kl_horizon=60), Pupil()
    context = context_of(stage, tmp_path)
    method = PolicyGradient(stage, context, policy, start_estimator(stage, context))
    found = [method.learn(scored_of(SCORES, kl=0.5), step, 10)["kl_coef"] for step in range(3)]
    assert found == pytest.approx([0.1, 0.102, 0.10404])
    assert [loss.kl_coef for _, loss, _, _ in policy.lessons] == pytest.approx(found)


def test_the_loss_is_the_recipe_s():
    stage = stage_of("dr_grpo", clip_range=0.1, clip_range_high=0.3, importance_cap=1.5, temperature=0.7)
    loss = objective(stage, 0.2)
    assert (loss.clip_range, loss.clip_range_high, loss.importance_cap, loss.temperature) == (0.1, 0.3, 1.5, 0.7)
    assert (loss.aggregation, loss.max_response_tokens, loss.kl_coef, loss.kl_estimator) == ("constant", 4, 0.2, "k3")
    assert objective(stage_of("ppo", clip_range=0.15), 0.2).clip_range_high == 0.15


def test_pairs_are_the_best_and_the_worst_of_each_prompt_without_ties():
    pairs = best_against_worst(scored_of(SCORES, kl=0.5), 3)
    assert len(pairs) == 1
    assert (pairs.chosen.tokens[0].tolist(), pairs.rejected.tokens[0].tolist()) == (
        [20, 21, 22, 23, 24],
        [10, 11, 12, 0, 0],
    )
    assert (pairs.chosen_ref_logprobs.tolist(), pairs.rejected_ref_logprobs.tolist()) == ([-4.5], [-1.5])


def test_the_same_response_is_no_pair_even_at_different_scores():
    scored = scored_of([1.0, 2.0], per_prompt=2)
    scored.batch.tokens[1] = scored.batch.tokens[0]
    scored.batch.attention_mask[1] = scored.batch.attention_mask[0]
    assert len(best_against_worst(scored, 2)) == 0


def test_online_dpo_trains_on_its_pairs_and_counts_both_sides(tmp_path):
    stage, policy = stage_of("online_dpo", epochs=2, beta=0.3, temperature=0.7), Pupil()
    context = context_of(stage, tmp_path)
    metrics = OnlineDpo(stage, context, policy).learn(scored_of([1.0, 2.0, 6.0, 4.0, 3.0, 5.0]), 0, 10)
    ((pairs, loss, minibatches, _),) = policy.lessons
    assert (metrics["pairs"], len(pairs), [len(rows) for rows in minibatches]) == (2, 2, [2, 2])
    assert (loss.temperature, loss.pair_loss.keywords) == (0.7, {"beta": 0.3})
    assert context.tracker.gradient_tokens == 2 * ((3 + 5) + (4 + 5))


def test_online_dpo_learns_nothing_where_all_is_tied(tmp_path):
    stage, policy = stage_of("online_dpo"), Pupil()
    context = context_of(stage, tmp_path)
    metrics = OnlineDpo(stage, context, policy).learn(scored_of([1.0] * 6), 0, 10)
    assert dict(metrics) == {"pairs": 0}
    assert (policy.lessons, context.tracker.gradient_tokens) == ([], 0)
