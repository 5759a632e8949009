"""The loop that SFT, reward modelling and preference training share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from rlhf.data.sampler import batches
from rlhf.engines.base import Objective
from rlhf.engines.schedule import lr_scale
from rlhf.errors import GuardError
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.stage_base import Training
from rlhf.roles import Learner
from rlhf.stages.context import StageContext
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
) -> None:
    """Train on shuffled batches of `rows` for the stage's epochs, one optimizer step per batch.

    Stops early when the recipe's budget is used up; a preference stage's `save_every` writes `checkpoints/step-<n>`.
    """
    plan = list(batches(len(rows), stage.batch_size, stage.epochs, context.seed("order")))
    context.tracker.begin("training", len(plan))
    with context.recovery.going_on([learner]) as going:
        skipped = going.carried.get("skipped", 0)
        for index, picked in enumerate(plan[going.step :], start=going.step):
            if context.spent() >= 1:
                break
            start = time.perf_counter()
            batch = collate([rows[row] for row in picked])
            total = context.total_steps(index, len(plan))
            context.tracker.expect(total)
            scale = lr_scale(stage.optimizer, index, total)
            metrics = learner.train(batch, objective, [range(len(picked))], scale).result()
            skipped = skipped + 1 if metrics["skipped_steps"] else 0
            if skipped == min(MAX_SKIPPED, len(plan)):
                raise GuardError(
                    f"the gradient was not finite {skipped} steps in a row;"
                    " lower optimizer.learning_rate or use float32"
                )
            tokens = batch.token_count()
            context.tracker.spend(gradient_tokens=tokens)
            speed = tokens / (time.perf_counter() - start)
            extra = {"learning_rate": scale * stage.optimizer.learning_rate, "tokens_per_second": speed}
            context.tracker.log(index + 1, {**metrics, **extra})
            if isinstance(stage, PreferenceStage) and stage.save_every and (index + 1) % stage.save_every == 0:
                learner.save(context.folder / "checkpoints" / f"step-{index + 1}").result()
            going.done(index + 1, partial(dict, skipped=skipped))
