"""The loop that SFT, classification, reward modelling and preference training share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from rlhf.data.sampler import batches, steps
from rlhf.engines.base import Objective
from rlhf.engines.schedule import lr_scale
from rlhf.errors import GuardError
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.stage_base import Training
from rlhf.roles import Learner
from rlhf.stages.context import StageContext
from rlhf.stages.heldout import Heldout, Trained
from rlhf.types import Rows

MAX_SKIPPED = 5
Row = TypeVar("Row")


def train_epochs(
    learner: Learner,
    rows: Sequence[Row],
    collate: Callable[[Sequence[Row]], Rows],
    objective: Objective,
    stage: Training,
    context: StageContext,
    heldout: Sequence[Row] = (),
) -> Trained:
    """Train on shuffled batches of `rows` for the stage's epochs, one optimizer step per batch.

    The `heldout` rows are evaluated before the first step, as the stage's `evaluations` says, and after the last step;
    the learner is left with the weights that stay by its `keep`. Stops early when the recipe's budget is used up; a
    preference stage's `save_every` writes `checkpoints/step-<n>`.
    """
    plan = list(batches(len(rows), stage.batch_size, stage.epochs, context.seed("order")))
    epoch = steps(len(rows), stage.batch_size, 1)
    watched = Heldout(learner, heldout, collate, objective, stage, context)
    context.tracker.begin("training", len(plan))
    with context.recovery.going_on([learner]) as going:
        step, skipped = going.step, going.carried.get("skipped", 0)
        watched.take_up(going.carried)
        if heldout and not step:
            context.tracker.log(0, watched.measure(0))
        for index, picked in enumerate(plan[going.step :], start=going.step):
            if context.spent() >= 1:
                break
            start = time.perf_counter()
            batch = collate([rows[row] for row in picked])
            total = context.total_steps(index, len(plan))
            context.tracker.expect(total)
            scale = lr_scale(stage.optimizer, index, total)
            metrics = learner.train(batch, objective, [range(len(picked))], scale).result()
            skipped = _skipped(skipped, metrics, len(plan))
            step = index + 1
            tokens = batch.token_count()
            context.tracker.spend(gradient_tokens=tokens)
            speed = tokens / (time.perf_counter() - start)
            extra = {"learning_rate": scale * stage.optimizer.learning_rate, "tokens_per_second": speed}
            final = step == len(plan) or context.spent() >= 1
            if watched.due(step, total, epoch) or (heldout and final):
                extra |= watched.measure(step, final)
            context.tracker.log(step, {**metrics, **extra})
            if isinstance(stage, PreferenceStage) and stage.save_every and step % stage.save_every == 0:
                learner.save(context.folder / "checkpoints" / f"step-{step}").result()
            going.done(step, partial(dict, skipped=skipped, **watched.carry()))
        if heldout and (watched.last is None or watched.last.step != step):  # time alone has used up the budget
            context.tracker.log(step, watched.measure(step, final=True))
    return watched.settle(step)


def _skipped(before: int, metrics: Mapping[str, float], planned: int) -> int:
    """Return how many steps in a row have been skipped; GuardError when they are too many."""
    skipped = before + 1 if metrics["skipped_steps"] else 0
    if skipped == min(MAX_SKIPPED, planned):
        raise GuardError(
            f"the gradient was not finite {skipped} steps in a row; lower optimizer.learning_rate or use float32"
        )
    return skipped
