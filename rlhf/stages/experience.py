"""From rollouts to a complete PPO batch: every role speaks once, then the advantages follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.algorithms.advantages import gae, token_rewards
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.masked import masked_mean, masked_sum, whiten
from rlhf.data.collate import collate_rollouts
from rlhf.errors import GuardError, TrainingError
from rlhf.recipe.stage_schema import PpoStage
from rlhf.roles import Roles
from rlhf.types import Experience, Metrics, Rollout, TokenScores

MAX_EMPTY = 0.5


def check_rollouts(rollouts: Sequence[Rollout]) -> None:
    """Refuse responses with no token or logprobs that are not finite, and batches of mostly empty text."""
    for rollout in rollouts:
        if not rollout.tokens:
            raise TrainingError(f"the engine returned no token for prompt {rollout.prompt.id}")
        if not all(map(math.isfinite, rollout.logprobs)):
            raise GuardError(
                f"the engine's logprobs for prompt {rollout.prompt.id} are not finite: the policy's weights hold NaN"
                " or infinity; start from another checkpoint, or lower optimizer.learning_rate"
            )
    empty = sum(not rollout.text.strip() for rollout in rollouts) / len(rollouts)
    if empty > MAX_EMPTY:
        raise GuardError(
            f"{empty:.0%} of the responses are empty text; check the chat template, or start from an SFT checkpoint"
        )


def collect(roles: Roles, rollouts: Sequence[Rollout], pad_id: int, stage: PpoStage) -> tuple[Experience, Metrics]:
    """Return the experience of a batch of rollouts, and what was measured on the way.

    The reward of token t is -kl_coef * kl[t], plus the (clipped, penalised) score at the last token
    (Ouyang et al. 2022, eq. 2); advantages are GAE, whitened over all response tokens.
    """
    batch = collate_rollouts(rollouts, pad_id)
    mask = batch.response_mask
    old_pending, ref_pending = roles.policy.logprobs(batch), roles.reference.logprobs(batch)
    score_pending, value_pending = roles.reward.score(rollouts), roles.critic.values(batch)
    old, ref = old_pending.result(), ref_pending.result()
    raw_scores, values = score_pending.result(), value_pending.result()
    kl = kl_estimate(old.logprobs, ref.logprobs, stage.kl_estimator).masked_fill(~mask, 0.0)
    unfinished = torch.tensor([rollout.finish_reason == "length" for rollout in rollouts])
    scores = raw_scores.clamp(-stage.score_clip, stage.score_clip) - stage.missing_eos_penalty * unfinished
    rewards = token_rewards(scores, kl, mask, stage.kl_coef)
    advantages, returns = gae(rewards, values, mask, stage.gamma, stage.gae_lambda)
    experience = Experience(
        batch=batch,
        scores=scores,
        kl=kl,
        old_logprobs=old.logprobs,
        ref_logprobs=ref.logprobs,
        values=values,
        returns=returns,
        advantages=whiten(advantages, mask),
    )
    return experience, _measure(experience, old, raw_scores, unfinished, stage)


def _measure(
    experience: Experience, old: TokenScores, raw_scores: Tensor, unfinished: Tensor, stage: PpoStage
) -> Metrics:
    mask = experience.batch.response_mask
    rows, tokens = len(experience), float(mask.sum())
    gap = (old.logprobs - experience.batch.rollout_logprobs).abs()
    error = (experience.returns - experience.values)[mask]
    spread = float(experience.returns[mask].var())
    per_row = Metrics.of(
        rows,
        reward=raw_scores.sum(),
        kl=masked_sum(old.logprobs - experience.ref_logprobs, mask),
        length=tokens,
        unfinished=unfinished.sum(),
    )
    per_token = Metrics.of(
        tokens, entropy=masked_sum(old.entropy, mask), agreement=masked_sum(gap, mask), value=experience.values.sum()
    )
    once = Metrics.of(
        1,
        agreement_max=gap[mask].max(),
        explained_variance=1 - float(error.var()) / spread if spread > 0 else 0.0,
        reward_std=raw_scores.std() if rows > 1 else 0.0,
        kl_penalty=stage.kl_coef * masked_mean(experience.kl, mask),
    )
    return per_row.merge(per_token).merge(once)
