"""The losses of the policy-gradient methods as objectives, for the policy and for the critic."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rlhf.algorithms.kl import KlEstimator
from rlhf.algorithms.masked import masked_sum
from rlhf.algorithms.ppo import (
    Aggregation,
    aggregation_count,
    aggregation_weights,
    importance_weights,
    kl_loss,
    policy_loss,
    value_loss,
)
from rlhf.engines.scoring import response_logprobs, response_values
from rlhf.types import Experience, Metrics, ValueBatch


@dataclass(frozen=True)
class ClippedPolicy:
    """The clipped surrogate, corrected for the difference of engine and trainer, plus kl_coef times the KL.

    Counts what `aggregation` divides by: response tokens, or sequences. With `kl_coef` 0 the KL is no part of it.
    `first_update` says that the weights are still those that the rollouts were drawn with, so the old logprobs are the
    present ones, and the batch need not know them.
    """

    clip_range: float
    clip_range_high: float
    importance_cap: float
    temperature: float
    aggregation: Aggregation
    max_response_tokens: int
    kl_coef: float
    kl_estimator: KlEstimator
    first_update: bool = False

    def count(self, batch: Experience) -> float:
        """Return the number of response tokens or of sequences."""
        return aggregation_count(batch.batch.response_mask, self.aggregation)

    def loss(self, model: nn.Module, batch: Experience) -> tuple[Tensor, Metrics]:
        """Return the weighted sum over response tokens of the clipped surrogate and the KL."""
        mask = batch.batch.response_mask
        logprobs = response_logprobs(model, batch.batch, self.temperature)
        old = logprobs.detach() if self.first_update else batch.old_logprobs
        importance = importance_weights(old, batch.batch.rollout_logprobs, self.importance_cap)
        weights = aggregation_weights(mask, self.aggregation, self.max_response_tokens)
        out = policy_loss(
            logprobs,
            old,
            batch.advantages,
            mask,
            (self.clip_range, self.clip_range_high),
            importance * weights,
        )
        metrics = Metrics.of(self.count(batch), policy_loss=out.loss.detach()).merge(
            Metrics.of(
                float(mask.sum()),
                clip_fraction=out.clip_fraction,
                approx_kl=out.approx_kl,
                ratio=out.ratio,
                importance_weight=masked_sum(importance, mask),
            )
        )
        if self.kl_coef == 0:
            return out.loss, metrics
        kl = kl_loss(logprobs, batch.ref_logprobs, mask, self.kl_estimator, weights)
        return out.loss + self.kl_coef * kl, metrics.merge(Metrics.of(self.count(batch), kl_loss=kl.detach()))


@dataclass(frozen=True)
class ClippedValue:
    """PPO's clipped value loss; counts response tokens."""

    value_clip_range: float

    def count(self, batch: ValueBatch) -> float:
        """Return the number of response tokens."""
        return float(batch.batch.response_mask.sum())

    def loss(self, model: nn.Module, batch: ValueBatch) -> tuple[Tensor, Metrics]:
        """Return the sum over response tokens of the clipped squared error to the returns."""
        values = response_values(model, batch.batch)
        out = value_loss(values, batch.values, batch.returns, batch.batch.response_mask, self.value_clip_range)
        return out.loss, Metrics.of(
            self.count(batch), value_loss=out.loss.detach(), value_clip_fraction=out.clip_fraction
        )
