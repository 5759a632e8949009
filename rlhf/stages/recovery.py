"""Where a stage goes on: its state is saved between steps, and an interrupted or failed stage is taken up there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf import checkpoint
from rlhf.checkpoint import Saved
from rlhf.interrupts import Interrupts
from rlhf.manifest import DamagedManifest, read_manifest
from rlhf.recipe.schema import Recovery
from rlhf.roles import Pending
from rlhf.tracking import Tracker

Carried = dict[str, Any]
ROOM = 1.02
"""Room for the files' headers and the manifest."""


class Kept(Protocol):
    """What a state holds: a learner, or what a stage has made so far."""

    def state_bytes(self) -> Pending[int]:
        """Return how many bytes `save_state` writes, about."""
        ...

    def save_state(self, folder: Path) -> Pending[None]:
        """Write it into a folder."""
        ...

    def load_state(self, folder: Path) -> Pending[None]:
        """Go on from what is there."""
        ...


@dataclass
class Going:
    """A loop between its steps. `step` are done, and `carried` is what it took along, in JSON; {} at the beginning."""

    recovery: StageRecovery
    kept: Sequence[Kept]
    step: int
    carried: Carried

    def done(self, step: int, carry: Callable[[], Carried] = dict, commit: bool = False) -> None:
        """Say that a step is done and recorded: its state is saved when that is due, and an interrupt takes effect.

        With `commit` the state is saved now; that is for stages whose state is small and whose steps are long.
        """
        recovery = self.recovery
        if commit or recovery.is_due(step) or recovery.interrupts.wanted:
            recovery.save(step, self.kept, carry())
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
    def going_on(self, kept: Sequence[Kept]) -> Iterator[Going]:
        """Bring what is kept and the tracker to the newest whole state, if there is one, for a loop inside.

        While it runs, an interrupt waits for the end of a step.
        """
        saved = checkpoint.newest(self.root, self.key)
        with self.interrupts.deferred():
            if saved is None:
                self.tracker.rewind(None)
                yield Going(self, kept, 0, {})
                return
            for loading in [item.load_state(saved.folder) for item in kept]:
                loading.result()
            self.tracker.rewind(saved.info["tracker"])
            self.tracker.say(f"goes on after step {saved.step}")
            yield Going(self, kept, saved.step, saved.info["carried"])

    def carried(self) -> Iterator[Carried]:
        """Yield what the loop took along in each state on disk."""
        for folder in checkpoint.states(self.root):
            with suppress(DamagedManifest):
                yield read_manifest(folder)["info"]["carried"]

    def is_due(self, step: int) -> bool:
        """Return whether the recipe wants the state after a step on disk."""
        if self.settings.every_steps:
            return step % self.settings.every_steps == 0
        return time.monotonic() - self.last >= 60 * self.settings.every_minutes

    def save(self, step: int, kept: Sequence[Kept], carried: Carried) -> Saved:
        """Write the state after a step, and remove what the recipe does not want to keep."""

        def fill(folder: Path) -> None:
            for saving in [item.save_state(folder) for item in kept]:
                saving.result()

        sizes = [asked.result() for asked in [item.state_bytes() for item in kept]]
        info = {
            "metrics": self.tracker.curve[-1] if self.tracker.curve else {},
            "tracker": self.tracker.mark(),
            "carried": carried,
            "content": self.content,
        }
        saved = checkpoint.write(self.root, step, self.key, fill, info, int(ROOM * sum(sizes)))
        best = self.settings.keep_best
        checkpoint.prune(self.root, self.settings.keep_last, (best.metric, best.mode) if best else None, saved)
        self.last = time.monotonic()
        return saved
