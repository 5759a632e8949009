"""Online DPO: the policy's own best sample of each prompt against its worst."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.preference import dpo_loss
from rlhf.data.sampler import batches
from rlhf.engines.preference_objectives import Preference
from rlhf.engines.schedule import lr_scale
from rlhf.recipe.online_schema import OnlineDpoStage
from rlhf.roles import Learner, Pending, Policy, Ready
from rlhf.stages.context import StageContext
from rlhf.stages.experience import Scored
from rlhf.types import Metrics, PreferenceBatch, TokenBatch


class OnlineDpo:
    """Pairs the samples of each prompt by score and takes DPO steps (Guo et al. 2024)."""

    compares_samples = True

    def __init__(self, stage: OnlineDpoStage, context: StageContext, policy: Policy) -> None:
        self.stage = stage
        self.context = context
        self.policy = policy
        self.objective = Preference(partial(dpo_loss, beta=stage.beta), stage.temperature)

    def learners(self) -> list[Learner]:
        """Return none beside the policy."""
        return []

    def carry(self) -> dict[str, float]:
        """Return nothing: each step stands for itself."""
        return {}

    def take_up(self, carried: Mapping[str, float]) -> None:
        """Do nothing."""

    def values(self, batch: TokenBatch) -> Pending[Tensor]:
        """Return zeros: there is no critic."""
        return Ready(torch.zeros(batch.tokens.shape))

    def learn(self, scored: Scored, step: int, total: int) -> Metrics:
        """Train on the step's pairs; a step in which every prompt is a tie changes nothing."""
        stage = self.stage
        pairs = best_against_worst(scored, stage.samples_per_prompt)
        metrics = Metrics.of(1, pairs=len(pairs))
        if not len(pairs):
            return metrics
        minibatches = list(
            batches(len(pairs), stage.minibatch_size, stage.epochs, self.context.seed("minibatches", step))
        )
        learned = self.policy.train(pairs, self.objective, minibatches, lr_scale(stage.optimizer, step, total))
        metrics = metrics.merge(learned.result())
        self.context.tracker.spend(gradient_tokens=stage.epochs * pairs.token_count())
        return metrics


def best_against_worst(scored: Scored, samples_per_prompt: int) -> PreferenceBatch:
    """Return a pair of each prompt whose samples differ in score; equal responses say nothing and are left out."""
    scores = scored.scores.view(-1, samples_per_prompt)
    first = torch.arange(len(scores)) * samples_per_prompt
    best, worst = first + scores.argmax(dim=1), first + scores.argmin(dim=1)
    tokens, real = scored.batch.tokens, scored.batch.attention_mask
    differ = ((tokens[best] != tokens[worst]) | (real[best] != real[worst])).any(dim=1)
    told_apart = differ & (scored.scores[best] > scored.scores[worst])
    chosen, rejected = best[told_apart].tolist(), worst[told_apart].tolist()
    ref_logprobs = sequence_logprobs(scored.ref_logprobs, scored.batch.response_mask)
    return PreferenceBatch(
        chosen=scored.batch.select(chosen),
        rejected=scored.batch.select(rejected),
        margins=torch.zeros(len(chosen)),
        chosen_ref_logprobs=ref_logprobs[chosen],
        rejected_ref_logprobs=ref_logprobs[rejected],
    )
