"""The methods that weigh each sampled token by its advantage: PPO, GRPO, Dr. GRPO, RLOO and REINFORCE++."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from rlhf.algorithms.advantages import group_centred, group_normalised, leave_one_out
from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.kl_controller import kl_controller
from rlhf.algorithms.masked import masked_mean
from rlhf.data.sampler import batches
from rlhf.engines.policy_objectives import ClippedPolicy
from rlhf.engines.schedule import lr_scale
from rlhf.recipe.base import ModelJudge
from rlhf.recipe.online_schema import (
    DrGrpoStage,
    GrpoStage,
    PolicyGradientStage,
    PpoStage,
    ReinforceStage,
    RlooStage,
)
from rlhf.roles import Learner, Pending, Policy
from rlhf.stages.context import StageContext
from rlhf.stages.estimators import AgainstBatch, AgainstGroup, Estimator, WithCritic
from rlhf.stages.experience import Scored
from rlhf.types import Experience, Metrics, TokenBatch


class PolicyGradient:
    """Estimates advantages and takes clipped steps along them; a critic trains at the same time as the policy.

    The ratio of all minibatches and epochs is to the policy before the step. With `old_logprobs: rollout` the trainer
    says nothing of it in the steps between agreement checks. Where such a step is one update, its own pass knows the
    old logprobs, so the loss is the same. Otherwise they are the engine's: the ratio of policy to engine is then at
    once the weight that corrects for what sampled, so every `importance_weight` is 1, and the clip bounds both.
    """

    def __init__(self, stage: PolicyGradientStage, context: StageContext, policy: Policy, estimator: Estimator) -> None:
        self.stage = stage
        self.context = context
        self.policy = policy
        self.estimator = estimator
        self.kl = kl_controller(stage.kl_coef, stage.target_kl, stage.kl_horizon)
        self.compares_samples = not isinstance(estimator, WithCritic) and (
            not isinstance(stage, ReinforceStage) or stage.baseline == "group"
        )

    def learners(self) -> list[Learner]:
        """Return the estimator's critic, if it has one."""
        return self.estimator.learners()

    def carry(self) -> dict[str, float]:
        """Return the weight of the KL."""
        return {"kl_coef": self.kl.coef}

    def take_up(self, carried: Mapping[str, float]) -> None:
        """Go on with the weight that was carried."""
        self.kl = replace(self.kl, coef=carried["kl_coef"])

    def values(self, batch: TokenBatch) -> Pending[Tensor]:
        """Ask the estimator's critic, if it has one."""
        return self.estimator.values(batch)

    def learn(self, scored: Scored, step: int, total: int) -> Metrics:
        """Train on the scored rollouts, policy and critic on the same minibatches."""
        stage, mask = self.stage, scored.batch.response_mask
        kl = kl_estimate(scored.old_logprobs, scored.ref_logprobs, stage.kl_estimator).masked_fill(~mask, 0.0)
        estimate = self.estimator.estimate(scored, kl, self.kl.coef if stage.kl_in == "reward" else 0.0, step)
        experience = Experience(
            batch=scored.batch,
            scores=scored.scores,
            kl=kl,
            old_logprobs=scored.old_logprobs,
            ref_logprobs=scored.ref_logprobs,
            advantages=estimate.advantages,
        )
        seed = self.context.seed("minibatches", step)
        minibatches = list(batches(len(experience), stage.minibatch_size, stage.epochs, seed, stage.samples_per_prompt))
        scale = lr_scale(stage.optimizer, step, total)
        first_update = scored.old is None and len(minibatches) == 1
        updates = [
            self.policy.train(experience, objective(stage, self.kl.coef, first_update), minibatches, scale),
            *estimate.update(minibatches, step, total),
        ]
        metrics = estimate.metrics.merge(Metrics.of(1, kl_penalty=self.kl.coef * masked_mean(kl, mask)))
        metrics = metrics.merge(_merged([update.result() for update in updates]))
        self.context.tracker.spend(gradient_tokens=len(updates) * stage.epochs * experience.token_count())
        if stage.target_kl:
            metrics = metrics.merge(Metrics.of(1, kl_coef=self.kl.coef))
            self.kl = self.kl.update(float(scored.kl()) / len(experience), len(experience))
        return metrics


def objective(stage: PolicyGradientStage, kl_coef: float, first_update: bool = False) -> ClippedPolicy:
    """Return the policy's loss as the stage sets it; `kl_coef` is 0 in it where the KL is part of the reward."""
    return ClippedPolicy(
        clip_range=stage.clip_range,
        clip_range_high=stage.clip_range_high or stage.clip_range,
        importance_cap=stage.importance_cap,
        temperature=stage.temperature,
        aggregation=stage.aggregation,
        max_response_tokens=stage.max_response_tokens,
        kl_coef=kl_coef if stage.kl_in == "loss" else 0.0,
        kl_estimator=stage.kl_estimator,
        first_update=first_update,
    )


def start_estimator(stage: PolicyGradientStage, context: StageContext) -> Estimator:
    """Return the stage's estimator; PPO's critic begins as the reward model, or as the policy when there is none."""
    match stage:
        case PpoStage():
            start = stage.reward.stage if isinstance(stage.reward, ModelJudge) else stage.policy
            spec = context.trained("critic", "scalar", start, stage.critic_optimizer, stage.critic_tuning)
            return WithCritic(context.launcher.critic(spec), stage)
        case GrpoStage():
            return AgainstGroup(group_normalised)
        case DrGrpoStage():
            return AgainstGroup(group_centred)
        case RlooStage():
            return AgainstGroup(leave_one_out)
        case ReinforceStage():
            return AgainstBatch(stage.gamma, stage.baseline)
    raise TypeError(stage.name)


def _merged(trained: list[Metrics]) -> Metrics:
    """Return the policy's metrics and the critic's, whose names that the policy has too begin with `critic_`."""
    policy, *critics = trained
    for critic in critics:
        names = {name: f"critic_{name}" if name in policy else name for name in critic}
        policy = policy.merge(Metrics({names[name]: sums for name, sums in critic.sums.items()}))
    return policy
