"""Losses on preferences as objectives: what each one counts, sums and reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.ordering import wins
from rlhf.algorithms.preference import PairLogprobs, PairLoss, implicit_rewards, kto_loss
from rlhf.engines.scoring import response_logprobs
from rlhf.types import LabelledBatch, Metrics, PreferenceBatch, TokenBatch


@dataclass(frozen=True)
class Preference:
    """Any loss on pairs, against reference logprobs that the batch carries; counts pairs.

    `pair_loss` is a loss with its settings: `partial(dpo_loss, beta=0.1)`. The policy's logprobs are at `temperature`,
    as the reference's must be.
    """

    pair_loss: PairLoss
    temperature: float = 1.0

    def count(self, batch: PreferenceBatch) -> float:
        """Return the number of pairs."""
        return float(len(batch))

    def loss(self, model: nn.Module, batch: PreferenceBatch) -> tuple[Tensor, Metrics]:
        """Return the sum of the loss, both sides of every pair in one pass; rewards are the loss's own.

        `accuracy` is the share of pairs whose chosen side has the larger reward; equal rewards count one half.
        """
        both = TokenBatch.stack([batch.chosen, batch.rejected])
        logprobs = response_logprobs(model, both, self.temperature)
        chosen, rejected = sequence_logprobs(logprobs, both.response_mask).chunk(2)
        ref_chosen, ref_rejected = batch.chosen_ref_logprobs.to(chosen), batch.rejected_ref_logprobs.to(chosen)
        lengths = both.response_mask.sum(dim=1).chunk(2)
        out = self.pair_loss(PairLogprobs(chosen, rejected, ref_chosen, ref_rejected, *lengths))
        loss, chosen_reward, rejected_reward = out.loss.sum(), out.chosen_reward.detach(), out.rejected_reward.detach()
        return loss, Metrics.of(
            len(batch),
            loss=loss.detach(),
            accuracy=wins(chosen_reward, rejected_reward).sum(),
            margin=(chosen_reward - rejected_reward).sum(),
            chosen_logprob=chosen.detach().sum(),
            rejected_logprob=rejected.detach().sum(),
            chosen_reward=chosen_reward.sum(),
            rejected_reward=rejected_reward.sum(),
        )


@dataclass(frozen=True)
class Kto:
    """KTO against reference logprobs and a reference point that the batch carries; counts sequences."""

    beta: float
    desirable_weight: float
    undesirable_weight: float

    def count(self, batch: LabelledBatch) -> float:
        """Return the number of sequences."""
        return float(len(batch))

    def loss(self, model: nn.Module, batch: LabelledBatch) -> tuple[Tensor, Metrics]:
        """Return the sum of the loss over the sequences.

        `chosen_*` are means over the desirable sequences, `rejected_*` over the others. `accuracy` is the share of
        sequences on the right side of the reference point (one half for each at it) and `margin` twice their mean
        distance from it, which with equally many of both kinds is the difference of the mean rewards.
        """
        logprobs = sequence_logprobs(response_logprobs(model, batch.batch), batch.batch.response_mask)
        desirable, ref_logprobs, kl = batch.desirable, batch.ref_logprobs.to(logprobs), batch.kl.to(logprobs)
        weights = (self.desirable_weight, self.undesirable_weight)
        loss = kto_loss(logprobs, ref_logprobs, desirable, kl, self.beta, *weights).sum()
        logprobs = logprobs.detach()
        rewards = implicit_rewards(logprobs, ref_logprobs, self.beta)
        distance = (rewards - self.beta * kl) * (2 * desirable.to(rewards) - 1)
        metrics = Metrics.of(
            len(batch),
            loss=loss.detach(),
            accuracy=wins(distance, torch.zeros_like(distance)).sum(),
            margin=2 * distance.sum(),
            kl=kl.sum(),
        )
        for name, rows in (("chosen", desirable), ("rejected", ~desirable)):
            sums = {f"{name}_logprob": logprobs[rows].sum(), f"{name}_reward": rewards[rows].sum()}
            metrics = metrics.merge(Metrics.of(int(rows.sum()), **sums))
        return loss, metrics
