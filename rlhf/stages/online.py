"""Training a policy on its own rollouts: generate, score, learn, publish the new weights, whatever the method."""

from __future__ import annotations

import time
from typing import Protocol

from rlhf.data.reading import read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.errors import GuardError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.online_schema import AnyOnlineStage, OnlineDpoStage, OnlineStage, PolicyGradientStage
from rlhf.recipe.resources import reference_in_policy
from rlhf.roles import Policy, Reference, Roles, SharedReference
from rlhf.stages.context import StageContext
from rlhf.stages.experience import Scored, Valued, collect, measure
from rlhf.stages.online_dpo import OnlineDpo
from rlhf.stages.online_draw import draw
from rlhf.stages.policy_gradient import PolicyGradient, start_estimator
from rlhf.stages.samples import write_samples
from rlhf.stages.sft import Summary
from rlhf.types import Metrics


class Method(Valued, Protocol):
    """What differs between the methods; `compares_samples` says whether a prompt's samples are set side by side."""

    compares_samples: bool

    def learn(self, scored: Scored, step: int, total: int) -> Metrics:
        """Train on a step's scored rollouts, step `step` (from 0) of `total`, and count the tokens."""
        ...


def run(stage: AnyOnlineStage, context: StageContext) -> Summary:
    """Train the policy for the stage's steps, or until the budget is used up, and save it merged."""
    tokenizer = context.tokenizer(stage.policy)
    prompts = tokenize_prompts(read_prompts(stage.prompts), tokenizer, stage.max_prompt_tokens)
    roles, method = start_roles(stage, context, tokenizer)
    watched = context.judge(stage.gold, tokenizer.pad_id) if stage.gold else None
    receipt = roles.policy.publish(roles.rollout, 0).result()
    context.tracker.begin("", stage.steps)
    for step in range(stage.steps):
        if context.spent() >= 1:
            break
        clock = _Clock()
        total = context.total_steps(step, stage.steps)
        context.tracker.expect(total)
        drawn = draw(roles, prompts, step, stage, context)
        clock.lap("generate")
        scored = collect(roles, method, drawn.rollouts, drawn.score, tokenizer.pad_id, stage)
        metrics = measure(scored, method.compares_samples).merge(drawn.metrics)
        check_step(metrics, step, stage)
        clock.lap("score")
        if watched:
            golds = watched.score(drawn.rollouts).result()
            metrics = metrics.merge(Metrics.of(len(golds), gold=golds.sum()))
        learned = method.learn(scored, step, total)
        check_learned(learned)
        metrics = metrics.merge(learned)
        clock.lap("learn")
        receipt = roles.policy.publish(roles.rollout, step + 1).result()
        clock.lap("publish")
        clock.laps["tokens_per_second"] = drawn.tokens / sum(clock.laps.values())
        context.tracker.log(step + 1, {**metrics, **clock.laps})
        write_samples(context.folder / "samples", step + 1, drawn.rollouts, scored.scores.tolist())
        if stage.save_every and (step + 1) % stage.save_every == 0:
            roles.policy.save(context.folder / "checkpoints" / f"step-{step + 1}").result()
    roles.policy.save(context.folder / "model").result()
    return {"steps": receipt.version, "weight_version": receipt.version, "publish_bytes": receipt.bytes}


def start_roles(stage: AnyOnlineStage, context: StageContext, tokenizer: ChatTokenizer) -> tuple[Roles, Method]:
    """Start all roles, the method's critic included."""
    launcher = context.launcher
    policy = launcher.policy(
        context.trained("policy", "causal", stage.policy, stage.optimizer, stage.lora, temperature=stage.temperature)
    )
    if reference_in_policy(context.recipe, stage):
        reference: Reference = SharedReference(policy)
    else:
        reference = launcher.reference(context.frozen("reference", "causal", stage.policy, stage.temperature))
    reward = context.judge(stage.reward, tokenizer.pad_id)
    method = start_method(stage, context, policy)
    return Roles(policy, reference, reward, launcher.rollout(context.rollout(stage.policy))), method


def start_method(stage: PolicyGradientStage | OnlineDpoStage, context: StageContext, policy: Policy) -> Method:
    """Return the stage's method for a policy."""
    if isinstance(stage, OnlineDpoStage):
        return OnlineDpo(stage, context, policy)
    return PolicyGradient(stage, context, policy, start_estimator(stage, context))


def check_step(metrics: Metrics, step: int, stage: OnlineStage) -> None:
    """Stop when engine and trainer disagree or the policy has run away from the reference."""
    gate = stage.agreement
    if step % gate.interval == 0 and not metrics["agreement"] <= gate.tolerance:
        raise GuardError(
            f"engine and trainer logprobs differ by {metrics['agreement']:.3f} nats in the mean"
            f" (tolerance {gate.tolerance}); the engine may serve wrong weights, or use model.dtype: float32"
        )
    if not metrics["kl"] <= stage.max_kl:
        remedy = "beta" if isinstance(stage, OnlineDpoStage) else "kl_coef"
        raise GuardError(
            f"the KL to the reference is {metrics['kl']:.1f} nats a response (max_kl {stage.max_kl});"
            f" raise {remedy} or lower optimizer.learning_rate"
        )


def check_learned(metrics: Metrics) -> None:
    """Stop when every minibatch of a step had a gradient that is not finite; the engine has skipped them all."""
    for role, prefix in (("policy", ""), ("critic", "critic_")):
        if metrics.get(f"{prefix}skipped_steps") == 1:
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
