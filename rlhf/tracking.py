"""Where metrics go: `metrics.jsonl` of the stage, the display, and the sinks that the recipe asks for."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rlhf.progress import Display
from rlhf.report.curves import Curve
from rlhf.sinks.base import Sink
from rlhf.stage_progress import PROGRESS, StageProgress


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
        self.path = folder / "metrics.jsonl"
        self.progress = StageProgress(folder / PROGRESS)
        self.step = 0
        self.started = time.monotonic()
        self.gradient_tokens = self.generated_tokens = 0

    def spend(self, gradient_tokens: int = 0, generated_tokens: int = 0) -> None:
        """Count tokens that were trained on (once per pass and model) or sampled."""
        self.gradient_tokens += gradient_tokens
        self.generated_tokens += generated_tokens

    def mark(self) -> dict[str, float]:
        """Return what `rewind` needs to come back here."""
        offset = self.path.stat().st_size if self.path.exists() else 0
        return {
            "step": self.step,
            "offset": offset,
            "seconds": time.monotonic() - self.started,
            "gradient_tokens": self.gradient_tokens,
            "generated_tokens": self.generated_tokens,
        }

    def rewind(self, mark: Mapping[str, float] | None) -> None:
        """Forget the rows and the counts after a mark, or all of them; seconds count from the mark's on."""
        mark = mark or dict.fromkeys(("step", "offset", "seconds", "gradient_tokens", "generated_tokens"), 0)
        self.step = int(mark["step"])
        self.started = time.monotonic() - mark["seconds"]
        self.gradient_tokens, self.generated_tokens = int(mark["gradient_tokens"]), int(mark["generated_tokens"])
        self.progress.begin_again(self.step)
        if self.sink:
            self.sink.rewind(self.stage, self.step)
        if not self.path.exists():
            return
        os.truncate(self.path, int(mark["offset"]))
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        self.curve = [{name: _number(value) for name, value in row.items() if name != "time"} for row in rows]

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **finite}) + "\n")
        if self.sink:
            self.sink.log(self.stage, step, values)
        self.advance(step, values)
        self.curve.append({"step": step, **values})
        self.watch(self.curve)


def _number(value: float | None) -> float:
    """Return a number as it was before it became JSON."""
    return math.nan if value is None else value
