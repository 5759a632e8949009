"""What every step of an online method makes of its rollouts, whichever loop has them drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rlhf.errors import GuardError
from rlhf.recipe.online_schema import AnyOnlineStage, OnlineDpoStage, OnlineStage, PolicyGradientStage
from rlhf.roles import Learner, RewardSource, Roles, WeightReceipt
from rlhf.stages.context import StageContext
from rlhf.stages.experience import Scored, Valued, collect, measure
from rlhf.stages.online_draw import Draw
from rlhf.stages.recovery import Going, Kept
from rlhf.stages.samples import forget_samples, is_kept, write_samples
from rlhf.types import Metrics, Prompt

SAMPLES = "samples"


class Method(Valued, Protocol):
    """What differs between the methods; `compares_samples` says whether a prompt's samples are set side by side."""

    compares_samples: bool

    def learners(self) -> Sequence[Learner]:
        """Return the models that it trains beside the policy."""
        ...

    def carry(self) -> dict[str, float]:
        """Return what it takes from step to step, in JSON."""
        ...

    def take_up(self, carried: Mapping[str, float]) -> None:
        """Go on with what an earlier `carry` returned."""
        ...

    def learn(self, scored: Scored, step: int, total: int) -> Metrics:
        """Train on a step's scored rollouts, step `step` (from 0) of `total`, and count the tokens."""
        ...


@dataclass(frozen=True)
class Training:
    """All that a loop works with; `watched` is a judge whose mean is only logged."""

    stage: AnyOnlineStage
    context: StageContext
    roles: Roles
    method: Method
    watched: RewardSource | None
    prompts: Sequence[Prompt]
    pad_id: int

    def publish(self, version: int) -> WeightReceipt:
        """Send the policy's weights to the engine, as `version`."""
        return self.roles.policy.publish(self.roles.rollout, version).result()


@contextmanager
def going_on(training: Training, *beside: Kept) -> Iterator[Going]:
    """Bring policy, critic, method and tracker to where the stage was; the engine still has to get the weights.

    What is `beside` them is kept in the states too.
    """
    method = training.method
    with training.context.recovery.going_on([training.roles.policy, *method.learners(), *beside]) as going:
        forget_samples(training.context.folder / SAMPLES, going.step, training.stage.samples)
        if going.step:
            method.take_up(going.carried["method"])
        yield going


class Clock:
    """Seconds of each phase of a step; a phase may come in several laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a phase."""
        now = time.perf_counter()
        name = f"seconds_{name}"
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now


@dataclass(frozen=True)
class Step:
    """A step's number (from 0), how many there will be, and its clock, which runs from its beginning.

    `turned` are the seconds that had gone into turns on shared devices before it.
    """

    number: int
    total: int
    turned: float
    clock: Clock = field(default_factory=Clock)


def steps(training: Training, done: int = 0) -> Iterator[Step]:
    """Yield the stage's steps after those that are done, until the budget is used up."""
    stage, context = training.stage, training.context
    for number in range(done, stage.steps):
        if context.spent() >= 1:
            return
        total = context.total_steps(number, stage.steps)
        context.tracker.expect(total)
        yield Step(number, total, context.launcher.seconds_in_turns())


def make_step(
    training: Training,
    step: Step,
    drawn: Draw,
    gate: Callable[[], Metrics] | None = None,
    engine_idle: Callable[[], object] | None = None,
) -> WeightReceipt:
    """Score the rollouts, check and measure them, learn, publish the new weights, and record it all.

    `gate` is a check of the weights before they change. `engine_idle` waits until the engine may get the new ones;
    that time counts as generation.
    """
    stage, context, roles, clock = training.stage, training.context, training.roles, step.clock
    asked = asks_policy(stage, step.number)
    scored = collect(roles, training.method, drawn.rollouts, drawn.score, training.pad_id, stage, asked)
    metrics = measure(scored, training.method.compares_samples).merge(drawn.metrics)
    if gate:
        metrics = metrics.merge(gate())
    check_step(metrics, step.number, stage)
    clock.lap("score")
    if training.watched:
        golds = training.watched.score(scored.rollouts).result()
        metrics = metrics.merge(Metrics.of(len(golds), gold=golds.sum()))
    learned = training.method.learn(scored, step.number, step.total)
    check_learned(learned)
    metrics = metrics.merge(learned)
    clock.lap("learn")
    if engine_idle:
        engine_idle()
        clock.lap("generate")
    receipt = training.publish(step.number + 1)
    clock.lap("publish")
    clock.laps["tokens_per_second"] = drawn.tokens / sum(clock.laps.values())
    if context.recipe.roles.rollout.share:  # a part of the phases before
        clock.laps["seconds_turns"] = context.launcher.seconds_in_turns() - step.turned
    context.tracker.log(receipt.version, {**metrics, **clock.laps})
    _keep_samples(training, receipt.version, scored)
    if stage.save_every and receipt.version % stage.save_every == 0:
        roles.policy.save(context.folder / "checkpoints" / f"step-{receipt.version}").result()
    return receipt


def _keep_samples(training: Training, step: int, scored: Scored) -> None:
    """Write the rollouts of a step (from 1) where the stage wants them, and remove those that stay no longer."""
    folder, files = training.context.folder / SAMPLES, training.stage.samples
    if is_kept(step, step, files):
        training.context.tracker.wrote(write_samples(folder, step, scored.rollouts, scored.scores.tolist()))
        forget_samples(folder, step, files)


def asks_policy(stage: OnlineStage, step: int) -> bool:
    """Return whether the trainer scores a step's rollouts: always, or where the gate between it and the engine is due.

    In other steps `old_logprobs: rollout` takes the engine's logprobs.
    """
    by_engine = isinstance(stage, PolicyGradientStage) and stage.old_logprobs == "rollout"
    return not by_engine or step % stage.agreement.every == 0


def check_step(metrics: Metrics, step: int, stage: OnlineStage) -> None:
    """Stop when engine and trainer disagree or the policy has run away from the reference.

    Rollouts of older weights say nothing of the engine; `rlhf.stages.overlap` then asks it for fresh ones.
    """
    fresh = not metrics.get("staleness")
    if fresh and step % stage.agreement.every == 0:
        check_agreement(metrics["agreement"], stage)
    if not metrics["kl"] <= stage.max_kl:
        remedy = "beta" if isinstance(stage, OnlineDpoStage) else "kl_coef"
        raise GuardError(
            f"the KL to the reference is {metrics['kl']:.1f} nats a response (max_kl {stage.max_kl});"
            f" raise {remedy} or lower optimizer.learning_rate"
        )


def check_agreement(gap: float, stage: OnlineStage) -> None:
    """Stop when engine and trainer, both with the same weights, differ by more than the stage tolerates."""
    if not gap <= stage.agreement.tolerance:
        raise GuardError(
            f"engine and trainer logprobs differ by {gap:.3f} nats in the mean"
            f" (tolerance {stage.agreement.tolerance}); the engine may serve wrong weights, or use model.dtype: float32"
        )


def check_learned(metrics: Metrics) -> None:
    """Stop when every minibatch of a step had a gradient that is not finite; the engine has skipped them all."""
    for role, prefix in (("policy", ""), ("critic", "critic_")):
        if metrics.get(f"{prefix}skipped_steps") == 1:
            raise GuardError(
                f"the gradient of the {role} was not finite in any minibatch of this step;"
                f" lower {prefix}optimizer.learning_rate or use model.dtype: float32"
            )
