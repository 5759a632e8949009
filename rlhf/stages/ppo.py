"""PPO: generate, score, learn, publish the new weights; once per step, fully or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rlhf.data.reading import read_prompts
from rlhf.data.sampler import batches, prompt_batch
from rlhf.data.tokenize import tokenize_prompts
from rlhf.engines.objectives import ClippedPolicy, ClippedValue
from rlhf.engines.schedule import lr_scale
from rlhf.errors import GuardError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.base import ModelJudge
from rlhf.recipe.stage_schema import PpoStage
from rlhf.roles import Reference, Roles, SharedReference
from rlhf.stages.context import StageContext
from rlhf.stages.experience import check_rollouts, collect
from rlhf.stages.samples import write_samples
from rlhf.stages.sft import Summary
from rlhf.types import Experience, Metrics, Prompt, Rollout, Sampling


def run(stage: PpoStage, context: StageContext) -> Summary:
    """Train the policy for the stage's steps and save it merged."""
    tokenizer = context.tokenizer(stage.policy)
    prompts = tokenize_prompts(read_prompts(stage.prompts), tokenizer, stage.max_prompt_tokens)
    roles = start_roles(stage, context, tokenizer)
    watched = context.judge(stage.gold, tokenizer.pad_id) if stage.gold else None
    receipt = roles.policy.publish(roles.rollout, 0).result()
    context.tracker.begin("", stage.steps)
    for step in range(stage.steps):
        clock = _Clock()
        rollouts = generate(roles, prompts, step, stage, context)
        check_rollouts(rollouts)
        clock.lap("generate")
        experience, metrics = collect(roles, rollouts, tokenizer.pad_id, stage)
        check_step(metrics, step, stage)
        clock.lap("score")
        if watched:
            golds = watched.score(rollouts).result()
            metrics = metrics.merge(Metrics.of(len(golds), gold=golds.sum()))
        learned = learn(roles, experience, step, stage, context)
        check_learned(learned)
        metrics = metrics.merge(learned)
        clock.lap("learn")
        receipt = roles.policy.publish(roles.rollout, step + 1).result()
        clock.lap("publish")
        generated = sum(len(rollout.tokens) for rollout in rollouts)
        clock.laps["tokens_per_second"] = generated / sum(clock.laps.values())
        context.tracker.log(step + 1, {**metrics, **clock.laps})
        write_samples(context.folder / "samples", step + 1, rollouts, experience.scores.tolist())
        if stage.save_every and (step + 1) % stage.save_every == 0:
            roles.policy.save(context.folder / "checkpoints" / f"step-{step + 1}").result()
    roles.policy.save(context.folder / "model").result()
    return {"steps": stage.steps, "weight_version": receipt.version, "publish_bytes": receipt.bytes}


def start_roles(stage: PpoStage, context: StageContext, tokenizer: ChatTokenizer) -> Roles:
    """Start all five roles; the critic begins as the reward model, or as the policy when there is none."""
    launcher = context.launcher
    critic_start = stage.reward.stage if isinstance(stage.reward, ModelJudge) else stage.policy
    policy = launcher.policy(
        context.trained("policy", "causal", stage.policy, stage.optimizer, stage.lora, temperature=stage.temperature)
    )
    if context.recipe.roles.reference.share:
        reference: Reference = SharedReference(policy)
    else:
        reference = launcher.reference(context.frozen("reference", "causal", stage.policy, stage.temperature))
    return Roles(
        policy=policy,
        reference=reference,
        reward=context.judge(stage.reward, tokenizer.pad_id),
        critic=launcher.critic(
            context.trained("critic", "scalar", critic_start, stage.critic_optimizer, stage.critic_lora)
        ),
        rollout=launcher.rollout(context.rollout(stage.policy)),
    )


def generate(
    roles: Roles, prompts: Sequence[Prompt], step: int, stage: PpoStage, context: StageContext
) -> list[Rollout]:
    """Draw this step's rollouts and refuse any from other weights than the step's."""
    rows = prompt_batch(len(prompts), stage.prompts_per_step, step, context.seed("prompts"))
    picked = [prompts[row] for row in rows]
    seeds = [[context.seed(step, prompt.id, k) for k in range(stage.samples_per_prompt)] for prompt in picked]
    sampling = Sampling(stage.max_response_tokens, stage.temperature)
    rollouts = roles.rollout.generate(picked, sampling, seeds).result()
    stale = {rollout.policy_version for rollout in rollouts} - {step}
    if stale:
        raise GuardError(f"the rollout engine served weight versions {sorted(stale)}, the policy is at {step}")
    return rollouts


def check_step(metrics: Metrics, step: int, stage: PpoStage) -> None:
    """Stop when engine and trainer disagree or the policy has run away from the reference."""
    gate = stage.agreement
    if step % gate.interval == 0 and not metrics["agreement"] <= gate.tolerance:
        raise GuardError(
            f"engine and trainer logprobs differ by {metrics['agreement']:.3f} nats in the mean"
            f" (tolerance {gate.tolerance}); the engine may serve wrong weights, or use model.dtype: float32"
        )
    if not metrics["kl"] <= stage.max_kl:
        raise GuardError(
            f"the KL to the reference is {metrics['kl']:.1f} nats a response (max_kl {stage.max_kl});"
            " raise kl_coef or lower optimizer.learning_rate"
        )


def learn(roles: Roles, experience: Experience, step: int, stage: PpoStage, context: StageContext) -> Metrics:
    """Train policy and critic at the same time on the same minibatches."""
    minibatches = list(batches(len(experience), stage.minibatch_size, stage.epochs, context.seed("minibatches", step)))
    policy = ClippedPolicy(stage.clip_range, stage.importance_cap, stage.temperature)
    value = ClippedValue(stage.value_clip_range)
    updates = (
        roles.policy.train(experience, policy, minibatches, lr_scale(stage.optimizer, step, stage.steps)),
        roles.critic.train(experience, value, minibatches, lr_scale(stage.critic_optimizer, step, stage.steps)),
    )
    policy_metrics, critic_metrics = (update.result() for update in updates)
    renamed = {f"critic_{name}" if name in policy_metrics else name: s for name, s in critic_metrics.sums.items()}
    return policy_metrics.merge(Metrics(renamed))


def check_learned(metrics: Metrics) -> None:
    """Stop when every minibatch of a step had a gradient that is not finite; the engine has skipped them all."""
    for role, prefix in (("policy", ""), ("critic", "critic_")):
        if metrics[f"{prefix}skipped_steps"] == 1:
            raise GuardError(
                f"the gradient of the {role} was not finite in any minibatch of this step;"
                f" lower {prefix}optimizer.learning_rate or use model.dtype: float32"
            )


class _Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"seconds_{name}"] = now - self.last
        self.last = now
