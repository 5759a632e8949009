"""Advantage estimators: one with a critic, which it trains, and those for which other samples are the baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf.algorithms.advantages import gae, group_centred, to_tokens, token_rewards, whitened_to_go
from rlhf.algorithms.masked import masked_sum, whiten
from rlhf.engines.policy_objectives import ClippedValue
from rlhf.engines.schedule import lr_scale
from rlhf.recipe.online_schema import PpoStage
from rlhf.roles import Critic, Learner, Pending, Ready
from rlhf.stages.experience import Scored
from rlhf.types import Metrics, TokenBatch, ValueBatch

Minibatches = Sequence[Sequence[int]]
CriticUpdate = Callable[[Minibatches, int, int], Sequence[Pending[Metrics]]]
"""Begins the training that belongs to an estimate, given the minibatches, the step and all steps."""


class Estimate(NamedTuple):
    """advantages `[B, T]`, 0 off the response; what was measured; and how the critic, if any, learns from the batch."""

    advantages: Tensor
    metrics: Metrics
    update: CriticUpdate


class Estimator(Protocol):
    """Says how much better each token was than expected."""

    def learners(self) -> list[Learner]:
        """Return the models that it trains."""
        ...

    def values(self, batch: TokenBatch) -> Pending[Tensor]:
        """Return the value before each response token, `[B, T]`; zeros without a critic."""
        ...

    def estimate(self, scored: Scored, kl: Tensor, kl_coef: float, step: int) -> Estimate:
        """Return advantages from scores and per-token KL `[B, T]`, of which `kl_coef` times is part of the reward.

        `step` counts the stage's steps from 0.
        """
        ...


@dataclass(frozen=True)
class WithCritic:
    """PPO: GAE over a critic's values, whitened over all response tokens.

    The reward of token t is -kl_coef * kl[t], plus the score at the last token (Ouyang et al. 2022, eq. 2).
    """

    critic: Critic
    stage: PpoStage

    def learners(self) -> list[Learner]:
        """Return the critic."""
        return [self.critic]

    def values(self, batch: TokenBatch) -> Pending[Tensor]:
        """Ask the critic."""
        return self.critic.values(batch)

    def estimate(self, scored: Scored, kl: Tensor, kl_coef: float, step: int) -> Estimate:
        """Return whitened GAE; the critic learns from the returns, and before the first step its head is fitted."""
        mask = scored.batch.response_mask
        rewards = token_rewards(scored.scores, kl, mask, kl_coef)
        values = self._fitted(scored.batch, rewards) if self._begins(step) else scored.values
        advantages, returns = gae(rewards, values, mask, self.stage.gamma, self.stage.gae_lambda)
        error, spread = (returns - values)[mask], float(returns[mask].var())
        explained = 1 - float(error.var()) / spread if spread > 0 else 0.0
        means = {"value": masked_sum(values, mask), "return": masked_sum(returns, mask)}
        metrics = Metrics.of(float(mask.sum()), **means).merge(Metrics.of(1, explained_variance=explained))
        update = partial(self._train, ValueBatch(scored.batch, values, returns))
        return Estimate(whiten(advantages, mask), metrics, update)

    def _begins(self, step: int) -> bool:
        return step == 0 and self.stage.critic_start == "fitted"

    def _fitted(self, batch: TokenBatch, rewards: Tensor) -> Tensor:
        """Fit the critic's head to the rewards to go (lambda 1: no value of its own in them), and ask it again."""
        nothing = torch.zeros_like(rewards)
        _, to_go = gae(rewards, nothing, batch.response_mask, self.stage.gamma, gae_lambda=1.0)
        return self.critic.fit_values(ValueBatch(batch, nothing, to_go)).result()

    def _train(self, batch: ValueBatch, minibatches: Minibatches, step: int, total: int) -> list[Pending[Metrics]]:
        scale = lr_scale(self.stage.critic_optimizer, step, total)
        return [self.critic.train(batch, ClippedValue(self.stage.value_clip_range), minibatches, scale)]


class _CriticFree:
    """What estimators without a critic share."""

    def learners(self) -> list[Learner]:
        """Return none."""
        return []

    def values(self, batch: TokenBatch) -> Pending[Tensor]:
        """Return zeros."""
        return Ready(torch.zeros(batch.tokens.shape))


@dataclass(frozen=True)
class AgainstGroup(_CriticFree):
    """GRPO, Dr. GRPO, RLOO: a response's tokens share one advantage, from the scores of the prompt's other samples.

    `compare` maps scores and groups `[B]` to advantages `[B]`. The sequence's KL is taken from its score before.
    """

    compare: Callable[[Tensor, Tensor], Tensor]

    def estimate(self, scored: Scored, kl: Tensor, kl_coef: float, step: int) -> Estimate:
        """Return the comparison's advantages, the same for all tokens of a response."""
        mask = scored.batch.response_mask
        totals = scored.scores - kl_coef * kl.masked_fill(~mask, 0).sum(dim=1)
        return Estimate(to_tokens(self.compare(totals, scored.groups), mask), Metrics(), _no_update)


@dataclass(frozen=True)
class AgainstBatch(_CriticFree):
    """REINFORCE++: rewards to go, whitened over the batch; baseline `group` first subtracts group means from scores."""

    gamma: float
    baseline: Literal["batch", "group"]

    def estimate(self, scored: Scored, kl: Tensor, kl_coef: float, step: int) -> Estimate:
        """Return whitened rewards to go; the KL is part of each token's reward."""
        mask, scores = scored.batch.response_mask, scored.scores
        if self.baseline == "group":
            scores = group_centred(scores, scored.groups)
        advantages = whitened_to_go(token_rewards(scores, kl, mask, kl_coef), mask, self.gamma)
        return Estimate(advantages, Metrics(), _no_update)


def _no_update(minibatches: Minibatches, step: int, total: int) -> tuple[()]:
    return ()
