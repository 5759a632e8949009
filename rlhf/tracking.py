"""Where metrics go: `metrics.jsonl` of the stage, the display, and the sinks that the recipe asks for."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.disk import failures_told
from rlhf.manifest import flush_folder
from rlhf.metrics_file import METRICS, MetricsFile
from rlhf.progress import Display
from rlhf.report.curves import Curve
from rlhf.sinks.base import Sink
from rlhf.stage_progress import PROGRESS, StageProgress

MARK = ("step", "offset", "rows", "seconds", "gradient_tokens", "generated_tokens")
PARENTS = 4
"""Folders above a stage's own that a run may have made, or named something in: flushed once, where that is allowed."""


class Tracker:
    """Writes the metrics of one stage, counts what it spends, and shows each new row to who watches the curve."""

    def __init__(
        self,
        stage: str,
        folder: Path,
        display: Display,
        sink: Sink | None,
        watch: Callable[[Curve], None] = lambda curve: None,
    ) -> None:
        self.stage = stage
        self.watch = watch
        self.curve: Curve = []
        self.display = display
        self.sink = sink
        self.folder = folder
        self.file = MetricsFile(folder / METRICS)
        self.unflushed: set[Path] = set()
        self.parents = list(folder.absolute().parents[:PARENTS])
        self.progress = StageProgress(folder / PROGRESS)
        self.step = 0
        self.started = time.monotonic()
        self.gradient_tokens = self.generated_tokens = 0

    def spend(self, gradient_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Count tokens that were trained on (once per pass and model) or sampled."""
        self.gradient_tokens += gradient_tokens
        self.generated_tokens += generated_tokens

    @property
    def path(self) -> Path:
        """Where the rows are."""
        return self.file.path

    def wrote(self, path: Path) -> None:
        """Note a file of the stage that must be on disk before the next state is."""
        self.unflushed.add(path)

    def flush(self) -> int:
        """Bring to disk the rows and what else was written since the last flush; return the size of the rows in bytes.

        Raises:
            ResourceError: the disk refuses.
        """
        offset = self.file.flush()
        for path in sorted(self.unflushed):
            with failures_told(path, "cannot be flushed"), suppress(FileNotFoundError), path.open("rb") as file:
                os.fsync(file.fileno())
        folders = {self.folder, *(path.parent for path in self.unflushed)}
        with failures_told(self.folder, "cannot be flushed"):
            for folder in sorted(filter(Path.is_dir, folders), reverse=True):
                flush_folder(folder)
        for folder in self.parents:
            with suppress(OSError):
                flush_folder(folder)
        self.unflushed.clear()
        self.parents.clear()
        return offset

    def mark(self) -> dict[str, float]:
        """Return what `rewind` needs to come back here, with all that a state refers to on disk, as `flush` says."""
        return {
            "step": self.step,
            "offset": self.flush(),
            "rows": len(self.curve),
            "seconds": time.monotonic() - self.started,
            "gradient_tokens": self.gradient_tokens,
            "generated_tokens": self.generated_tokens,
        }

    def rewind(self, mark: Mapping[str, float] | None) -> None:
        """Forget the rows and the counts after a mark, or all of them; seconds count from the mark's on.

        Rows of earlier steps that the file has lost are counted in a message; training needs none of them.
        """
        mark = mark or dict.fromkeys(MARK, 0)
        self.step = int(mark["step"])
        self.started = time.monotonic() - mark["seconds"]
        self.gradient_tokens, self.generated_tokens = int(mark["gradient_tokens"]), int(mark["generated_tokens"])
        self.progress.begin_again(self.step)
        if self.sink:
            self.sink.rewind(self.stage, self.step)
        found = self.file.cut(int(mark["offset"]))
        self.curve = [_curve_row(row) for row in found.rows]
        last = int(self.curve[-1]["step"]) if self.curve else 0
        missing = int(mark.get("rows", len(self.curve) + self.step - last)) - len(self.curve)
        if missing > 0:
            self.say(f"resumes without {missing} of its earlier rows: {self.path} was damaged or cut short")

    def say(self, message: str) -> None:
        """Tell people something about the stage."""
        self.display.say(f"{self.stage} {message}")

    def begin(self, label: str, total: int) -> None:
        """Show that a part of the stage with `total` steps begins."""
        self.display.stage(f"{self.stage} {label}".strip(), total)
        self.progress.begin(label, total)

    def expect(self, total: int) -> None:
        """Show that the part will have `total` steps after all."""
        self.display.expect(total)
        self.progress.expect(total)

    def advance(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that a step (from 1) is finished, with nothing to record."""
        self.step = step
        self.display.step(step, metrics)
        self.progress.advance(step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a finished step (from 1); non-finite values are written as null."""
        spent = {"gradient_tokens": self.gradient_tokens, "generated_tokens": self.generated_tokens}
        values = {name: float(value) for name, value in {**metrics, **spent}.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.append({"step": step, "time": time.time(), **finite})
        if self.sink:
            self.sink.log(self.stage, step, values)
        self.advance(step, values)
        self.curve.append({"step": step, **values})
        self.watch(self.curve)


def _curve_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Return a row of the file as `log` was given it: null stands for what was not finite."""
    values = {name: math.nan if value is None else value for name, value in row.items() if name != "time"}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}
