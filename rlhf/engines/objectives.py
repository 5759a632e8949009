"""The losses as objectives: what each one counts, sums and reports."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlhf.algorithms.ordering import wins
from rlhf.algorithms.reward_model import bradley_terry_loss
from rlhf.data.classes import ClassBatch
from rlhf.engines.scoring import class_logits, response_logprobs, sequence_scores
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
        """Return the sum of -log sigmoid(chosen score - rejected score - margin); equal scores are half accurate."""
        scores = sequence_scores(model, TokenBatch.stack([batch.chosen, batch.rejected]))
        chosen, rejected = scores.chunk(2)
        loss = bradley_terry_loss(chosen, rejected, batch.margins.to(scores)).sum()
        chosen, rejected = chosen.detach(), rejected.detach()
        accurate, margin = wins(chosen, rejected).sum(), (chosen - rejected).sum()
        return loss, Metrics.of(len(batch), loss=loss.detach(), accuracy=accurate, margin=margin)


@dataclass(frozen=True)
class Classify:
    """Cross-entropy over the classes, from the last real token; counts texts."""

    def count(self, batch: ClassBatch) -> float:
        """Return the number of texts."""
        return float(len(batch))

    def loss(self, model: nn.Module, batch: ClassBatch) -> tuple[Tensor, Metrics]:
        """Return the sum of -log p(label)."""
        logits = class_logits(model, batch.batch)
        loss = cross_entropy(logits, batch.labels, reduction="sum")
        hits = (logits.argmax(dim=1) == batch.labels).sum()
        return loss, Metrics.of(len(batch), loss=loss.detach(), accuracy=hits)


@dataclass(frozen=True)
class Confusion:
    """Counts, not learned from: how many texts of each class the model takes for which one, as `true>taken`."""

    def count(self, batch: ClassBatch) -> float:
        """Return the number of texts."""
        return float(len(batch))

    def loss(self, model: nn.Module, batch: ClassBatch) -> tuple[Tensor, Metrics]:
        """Return 0 and the sums of the texts by (class, class that the model gives the largest logit)."""
        taken = class_logits(model, batch.batch).argmax(dim=1)
        counts = Counter(zip(batch.labels.tolist(), taken.tolist(), strict=True))
        return taken.new_zeros(()), Metrics({f"{true}>{found}": (n, 1) for (true, found), n in counts.items()})
