"""How far a stage is, in a small file of its folder: `rlhf status` reads it while the stage goes on."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

PROGRESS = "progress.json"
INTERVAL_S = 1.0


@dataclass
class Progress:
    """Step `step` of `total` in the part `label` of a stage.

    `began` and `updated` are seconds since the epoch, and `first` is the step at which this process began.
    """

    label: str = ""
    step: int = 0
    total: int = 0
    first: int = 0
    began: float = 0.0
    updated: float = 0.0

    @property
    def rest(self) -> float | None:
        """Seconds that the remaining steps take at the pace so far; None before the first of them."""
        done = self.step - self.first
        return (self.updated - self.began) / done * (self.total - self.step) if done > 0 else None


def read_progress(folder: Path) -> Progress | None:
    """Return how far the stage of a folder is, None where it does not say."""
    try:
        found = Progress(**json.loads((folder / PROGRESS).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    counts = (found.step, found.total, found.first)
    times = (found.began, found.updated)
    whole = isinstance(found.label, str) and all(isinstance(count, int) for count in counts)
    return found if whole and all(isinstance(seconds, int | float) for seconds in times) else None


class StageProgress:
    """Writes the file: at the beginning and the end of a part, and in between once a second at most."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = Progress()
        self.written = 0.0

    def begin(self, label: str, total: int) -> None:
        """Begin a part of the stage."""
        now = time.time()
        self.now = Progress(label, 0, total, 0, now, now)
        self._write()

    def begin_again(self, step: int) -> None:
        """Go on after a step; what comes now is timed anew."""
        now = time.time()
        self.now.step = self.now.first = step
        self.now.began = self.now.updated = now
        self._write()

    def expect(self, total: int) -> None:
        """Correct the number of steps."""
        self.now.total = total

    def advance(self, step: int) -> None:
        """Say that a step is done."""
        self.now.step, self.now.updated = step, time.time()
        if step == self.now.total or self.now.updated - self.written >= INTERVAL_S:
            self._write()

    def _write(self) -> None:
        self.written = time.time()
        partial = self.path.with_suffix(".partial")
        with suppress(OSError):  # for who looks on; what training cannot do without says when a disk is full
            partial.write_text(json.dumps(asdict(self.now)) + "\n", encoding="utf-8")
            partial.replace(self.path)
