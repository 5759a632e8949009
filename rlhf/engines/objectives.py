"""The losses as objectives: what each one counts, sums and reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.masked import masked_sum
from rlhf.algorithms.ppo import importance_weights, policy_loss, value_loss
from rlhf.algorithms.preference import dpo_loss, implicit_rewards
from rlhf.algorithms.reward_model import bradley_terry_loss
from rlhf.engines.scoring import response_logprobs, response_values, sequence_scores
from rlhf.types import Experience, Metrics, PreferenceBatch, TokenBatch


@dataclass(frozen=True)
class Sft:
    """Cross-entropy on the response tokens; counts tokens."""

    def count(self, batch: TokenBatch) -> float:
        """Return the number of response tokens."""
        return float(batch.response_mask.sum())

    def loss(self, model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Metrics]:
        """Return the sum of -log p over the response tokens."""
        loss = -response_logprobs(model, batch).sum()
        return loss, Metrics.of(self.count(batch), loss=loss.detach())


@dataclass(frozen=True)
class RewardModel:
    """Bradley-Terry loss on pairs; counts pairs."""

    def count(self, batch: PreferenceBatch) -> float:
        """Return the number of pairs."""
        return float(len(batch))

    def loss(self, model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
        """Return the sum of -log sigmoid(chosen score - rejected score - margin)."""
        scores = sequence_scores(model, TokenBatch.stack([batch.chosen, batch.rejected]))
        chosen, rejected = scores.chunk(2)
        loss = bradley_terry_loss(chosen, rejected, batch.margins.to(scores)).sum()
        gap = (chosen - rejected).detach()
        return loss, Metrics.of(len(batch), loss=loss.detach(), accuracy=(gap > 0).sum(), margin=gap.sum())


@dataclass(frozen=True)
class Preference:
    """DPO against reference logprobs that the batch carries; counts pairs."""

    beta: float
    label_smoothing: float

    def count(self, batch: PreferenceBatch) -> float:
        """Return the number of pairs."""
        return float(len(batch))

    def loss(self, model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
        """Return the sum of the DPO loss, both sides of every pair in one pass."""
        both = TokenBatch.stack([batch.chosen, batch.rejected])
        chosen, rejected = sequence_logprobs(response_logprobs(model, both), both.response_mask).chunk(2)
        ref_chosen, ref_rejected = batch.chosen_ref_logprobs.to(chosen), batch.rejected_ref_logprobs.to(chosen)
        loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta, self.label_smoothing).sum()
        chosen_reward = implicit_rewards(chosen.detach(), ref_chosen, self.beta)
        rejected_reward = implicit_rewards(rejected.detach(), ref_rejected, self.beta)
        return loss, Metrics.of(
            len(batch),
            loss=loss.detach(),
            accuracy=(chosen_reward > rejected_reward).sum(),
            margin=(chosen_reward - rejected_reward).sum(),
            chosen_logprob=chosen.detach().sum(),
            rejected_logprob=rejected.detach().sum(),
            chosen_reward=chosen_reward.sum(),
            rejected_reward=rejected_reward.sum(),
        )


@dataclass(frozen=True)
class ClippedPolicy:
    """PPO's clipped surrogate, corrected for the difference of engine and trainer; counts response tokens."""

    clip_range: float
    importance_cap: float
    temperature: float

    def count(self, batch: Experience) -> float:
        """Return the number of response tokens."""
        return float(batch.batch.response_mask.sum())

    def loss(self, model: nn.Module, batch: Experience) -> tuple[Tensor, Metrics]:
        """Return the sum over response tokens of the clipped surrogate."""
        mask = batch.batch.response_mask
        logprobs = response_logprobs(model, batch.batch, self.temperature)
        weights = importance_weights(batch.old_logprobs, batch.batch.rollout_logprobs, self.importance_cap)
        out = policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, self.clip_range, weights)
        return out.loss, Metrics.of(
            self.count(batch),
            policy_loss=out.loss.detach(),
            clip_fraction=out.clip_fraction,
            approx_kl=out.approx_kl,
            ratio=out.ratio,
            importance_weight=masked_sum(weights, mask),
        )


@dataclass(frozen=True)
class ClippedValue:
    """PPO's clipped value loss; counts response tokens."""

    value_clip_range: float

    def count(self, batch: Experience) -> float:
        """Return the number of response tokens."""
        return float(batch.batch.response_mask.sum())

    def loss(self, model: nn.Module, batch: Experience) -> tuple[Tensor, Metrics]:
        """Return the sum over response tokens of the clipped squared error to the returns."""
        values = response_values(model, batch.batch)
        out = value_loss(values, batch.values, batch.returns, batch.batch.response_mask, self.value_clip_range)
        return out.loss, Metrics.of(
            self.count(batch), value_loss=out.loss.detach(), value_clip_fraction=out.clip_fraction
        )
