"""Where a stage goes on: its state is saved between steps, and an interrupted or failed stage is taken up there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import checkpoint
from rlhf.checkpoint import Saved
from rlhf.interrupts import Interrupts
from rlhf.recipe.schema import Recovery
from rlhf.roles import Learner
from rlhf.tracking import Tracker

Carried = dict[str, Any]
ROOM = 1.02
"""Room for the files' headers and the manifest."""


@dataclass
class Going:
    """A loop between its steps. `step` are done, and `carried` is what it took along, in JSON; {} at the beginning."""

    recovery: StageRecovery
    learners: Sequence[Learner]
    step: int
    carried: Carried

    def done(self, step: int, carry: Callable[[], Carried] = dict) -> None:
        """Say that a step is done and recorded: its state is saved when that is due, and an interrupt takes effect."""
        recovery = self.recovery
        if recovery.is_due(step) or recovery.interrupts.wanted:
            recovery.save(step, self.learners, carry())
        recovery.interrupts.check(f"after step {step}, which is saved")


class StageRecovery:
    """The states of one stage, in `root`.

    `key` names the stage's settings, which every state must share, and `content` tells them; `tracker` goes back to
    where the state was saved.
    """

    def __init__(
        self,
        root: Path,
        key: str,
        content: Mapping[str, Any],
        settings: Recovery,
        tracker: Tracker,
        interrupts: Interrupts,
    ) -> None:
        self.root = root
        self.key = key
        self.content = content
        self.settings = settings
        self.tracker = tracker
        self.interrupts = interrupts
        self.last = time.monotonic()

    @contextmanager
    def going_on(self, learners: Sequence[Learner]) -> Iterator[Going]:
        """Bring the learners and the tracker to the newest whole state, if there is one, for a loop inside.

        While it runs, an interrupt waits for the end of a step.
        """
        saved = checkpoint.newest(self.root, self.key)
        with self.interrupts.deferred():
            if saved is None:
                self.tracker.rewind(None)
                yield Going(self, learners, 0, {})
                return
            for loading in [learner.load_state(saved.folder) for learner in learners]:
                loading.result()
            self.tracker.rewind(saved.info["tracker"])
            self.tracker.say(f"goes on after step {saved.step}")
            yield Going(self, learners, saved.step, saved.info["carried"])

    def is_due(self, step: int) -> bool:
        """Return whether the recipe wants the state after a step on disk."""
        if self.settings.every_steps:
            return step % self.settings.every_steps == 0
        return time.monotonic() - self.last >= 60 * self.settings.every_minutes

    def save(self, step: int, learners: Sequence[Learner], carried: Carried) -> Saved:
        """Write the state after a step, and remove what the recipe does not want to keep."""

        def fill(folder: Path) -> None:
            for saving in [learner.save_state(folder) for learner in learners]:
                saving.result()

        sizes = [asked.result() for asked in [learner.state_bytes() for learner in learners]]
        info = {
            "metrics": self.tracker.curve[-1] if self.tracker.curve else {},
            "tracker": self.tracker.mark(),
            "carried": carried,
            "content": self.content,
        }
        saved = checkpoint.write(self.root, step, self.key, fill, info, int(ROOM * sum(sizes)))
        best = self.settings.keep_best
        checkpoint.prune(self.root, self.settings.keep_last, (best.metric, best.mode) if best else None)
        self.last = time.monotonic()
        return saved
