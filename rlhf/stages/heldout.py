"""Held-out rows of a stage that trains: which they are, what they say on the way, and which step's model stays."""

from __future__ import annotations

import hashlib
import math
import random
import shutil
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from rlhf import checkpoint
from rlhf.data.sequences import TokenSequence
from rlhf.data.splits import by_count, digest_array
from rlhf.engines.base import Objective
from rlhf.errors import DataError, TrainingError
from rlhf.recipe.schedule import FEWEST_ROWS, sft_heldout
from rlhf.recipe.stage_base import Training
from rlhf.recipe.stage_schema import SftStage
from rlhf.roles import Learner
from rlhf.stages.context import StageContext
from rlhf.types import Metrics, Rows

PART = 4096
"""Rows in one call, so that many are never one tensor."""

PREFIX = "heldout_"
Row = TypeVar("Row")


class Picked(Sequence[Row]):
    """Some rows of a sequence, in the order of their numbers; nothing is copied."""

    def __init__(self, rows: Sequence[Row], numbers: Sequence[int]) -> None:
        self.rows = rows
        self.numbers = numbers

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self.numbers)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        """Return the row at a place, or those of a slice."""
        if isinstance(place, slice):
            return [self.rows[number] for number in self.numbers[place]]
        return self.rows[self.numbers[place]]


def split_sequences(
    stage: SftStage, rows: Sequence[TokenSequence], context: StageContext
) -> tuple[Sequence[TokenSequence], Sequence[TokenSequence]]:
    """Return the rows to train on and a random share of them held out, both in their order.

    How many is `sft_heldout`; rows of the same tokens are on one side. DataError when nothing is left to train on.
    """
    wanted = sft_heldout(stage, len(rows))
    if stage.heldout_fraction > 0 and len(rows) < FEWEST_ROWS:
        context.tracker.say(
            f"has {len(rows)} rows, fewer than {FEWEST_ROWS}: none are held out, nothing is evaluated on the way,"
            " and the last model is the one that stays"
        )
    if not wanted:
        return rows, ()
    digests = digest_array(map(_digest, rows))
    train, heldout = by_count(digests, wanted, random.Random(context.seed("split")))
    if not train:
        raise DataError(f"all {len(rows)} rows are held out; lower stages.{stage.name}.heldout_fraction")
    return Picked(rows, train), Picked(rows, heldout)


def _digest(row: TokenSequence) -> bytes:
    return hashlib.blake2b(array("q", row.tokens).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Measured:
    """The held-out metrics, `heldout_loss` and others, of the model after a step."""

    step: int
    metrics: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The mean held-out loss."""
        return self.metrics[f"{PREFIX}loss"]


@dataclass(frozen=True)
class Trained:
    """What the loop of a stage came to: the step whose model the learner holds now, and its held-out metrics.

    `heldout` is empty where no rows are held out.
    """

    kept_step: int
    heldout: Mapping[str, float]

    def summary(self) -> dict[str, float | str | bool]:
        """Return it for the stage's summary."""
        return {"kept_step": self.kept_step, **self.heldout}


class Heldout(Generic[Row]):
    """Evaluates a learner on its held-out rows, and brings it back to the step that did best where that stays.

    The measure before the first step is there to compare with: what stays is a model that has been trained. The best
    so far lies beside the stage's saved states, whole or not at all, until the stage is done; each saved state names
    the best of its time, so a stage that goes on from one ends with the same model.
    """

    def __init__(
        self,
        learner: Learner,
        rows: Sequence[Row],
        collate: Callable[[Sequence[Row]], Rows],
        objective: Objective[Any],
        stage: Training,
        context: StageContext,
    ) -> None:
        self.learner = learner
        self.rows = rows
        self.collate = collate
        self.objective = objective
        self.stage = stage
        self.context = context
        self.last: Measured | None = None
        self.best: Measured | None = None

    def take_up(self, carried: Mapping[str, Any]) -> None:
        """Go on with what an earlier `carry` returned."""
        self.last, self.best = (Measured(**carried[name]) if carried.get(name) else None for name in ("last", "best"))

    def carry(self) -> dict[str, Any]:
        """Return what it takes from step to step, in JSON."""
        kept = {"last": self.last, "best": self.best}
        return {name: {"step": of.step, "metrics": dict(of.metrics)} for name, of in kept.items() if of}

    def due(self, step: int, total: int, epoch: int) -> bool:
        """Return whether the model after a step of `total` is evaluated; an epoch has `epoch` steps.

        `evaluations` divides the steps evenly, and the last step is always among its marks.
        """
        if not self.rows:
            return False
        often = self.stage.evaluations
        return step % epoch == 0 if often is None else step * often // total > (step - 1) * often // total

    def measure(self, step: int, final: bool = False) -> Mapping[str, float]:
        """Evaluate the model after a step, and keep its weights where it is the best so far and not the `final` one."""
        metrics = Metrics()
        for start in range(0, len(self.rows), PART):
            batch = self.collate(self.rows[start : start + PART])
            metrics = metrics.merge(self.learner.evaluate(batch, self.objective).result())
        self.last = Measured(step, {f"{PREFIX}{name}": value for name, value in metrics.items()})
        if step and self.last.loss < (self.best.loss if self.best else math.inf):
            self.best = self.last
            if self.stage.keep == "best" and not final:
                self._save()
        return self.last.metrics

    def settle(self, step: int) -> Trained:
        """Leave the learner, which has made its last step, with the weights that stay."""
        if self.stage.keep == "last" or self.best is None or self.best.step == step:
            return Trained(step, self.last.metrics if self.last else {})
        folder = self._root / f"step-{self.best.step:08d}"
        if wrong := checkpoint.problems(folder):
            raise TrainingError(
                f"the weights of step {self.best.step}, the best on the held-out rows, are damaged ({wrong[0]}); begin"
                f" again with --restart {self.stage.name}"
            )
        self.learner.load_state(folder).result()
        self.context.tracker.say(
            f"keeps the model of step {self.best.step} of {step}: held-out loss {self.best.loss:.4g}"
            f"{f', at the end {self.last.loss:.4g}' if self.last else ''}"
        )
        return Trained(self.best.step, self.best.metrics)

    @property
    def _root(self) -> Path:
        return self.context.recovery.root / "best"

    def _save(self) -> None:
        """Write the weights of the best step, and remove those that neither it nor a saved state names."""
        assert self.best is not None
        recovery = self.context.recovery
        size = self.learner.state_bytes().result()
        checkpoint.write(
            self._root,
            self.best.step,
            recovery.key,
            lambda folder: self.learner.save_state(folder).result(),
            {},
            size,
        )
        named = {self.best.step, *(carried["best"]["step"] for carried in recovery.carried() if carried.get("best"))}
        for folder in checkpoint.states(self._root):
            if checkpoint.step_of(folder) not in named:
                shutil.rmtree(folder, ignore_errors=True)
