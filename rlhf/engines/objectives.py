"""The losses as objectives: what each one counts, sums and reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from rlhf.algorithms.reward_model import bradley_terry_loss
from rlhf.engines.scoring import response_logprobs, sequence_scores
from rlhf.types import Metrics, PreferenceBatch, TokenBatch


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
