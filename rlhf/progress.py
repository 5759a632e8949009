"""What the user sees while a run goes on: one live display on a terminal, plain lines anywhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from rlhf.untrusted import printable

SHOWN = {
    "loss": "loss",
    "heldout_loss": "held-out loss",
    "accuracy": "accuracy",
    "reward": "reward",
    "gold": "gold",
    "kl": "kl",
    "entropy": "entropy",
    "length": "length",
    "tokens_per_second": "tok/s",
}
PLAIN_INTERVAL_S = 10.0


class Steps(MofNCompleteColumn):
    """Steps done of all; nothing before the first."""

    def render(self, task: Task) -> Text:
        """Return the column's text."""
        return Text() if task.total is None else super().render(task)


def brief(metrics: Mapping[str, float]) -> str:
    """Return the few metrics that people watch, in one short line."""
    return "  ".join(f"{SHOWN[name]} {metrics[name]:.3g}" for name in SHOWN if name in metrics)


class Display(logging.Handler):
    """Shows stages, steps and warnings of the `rlhf` log: live on a terminal, else a plain line every 10 seconds."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self.addFilter(lambda record: record.levelno == logging.WARNING)  # errors end the run and are shown there
        self.console = console
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        if console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24),
                Steps(),
                TextColumn("{task.fields[detail]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
            )
        self.label, self.total, self.started, self.printed = "", 0, 0.0, 0.0

    def say(self, message: str) -> None:
        """Print one line that stays."""
        self.console.print(printable(message), markup=False, highlight=False, soft_wrap=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning."""
        self.say(record.getMessage())

    def wait(self, text: str) -> None:
        """Say what is going on before the first step: a bar without a length, or a line."""
        if self.bar is None:
            self.say(text)
        else:
            self._show(text, None)

    def stage(self, label: str, total: int) -> None:
        """Begin a stage, or a part of one, of `total` steps."""
        self.label, self.total, self.started = label, total, time.monotonic()
        self.printed = self.started
        if self.bar is None:
            self.say(f"{label}: {total} steps")
        else:
            self._show(label, total)

    def expect(self, total: int) -> None:
        """Correct the number of steps, where a budget ends before the plan does."""
        self.total = total
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, total=total)

    def step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Report that `done` steps are finished."""
        now = time.monotonic()
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, detail=brief(metrics))
        elif now - self.printed >= PLAIN_INTERVAL_S or done == self.total:
            eta = f"  eta {(now - self.started) / done * (self.total - done):.0f}s" if done else ""
            self.printed = now
            self.say(f"{self.label}: step {done}/{self.total}  {brief(metrics)}{eta}")

    def _show(self, label: str, total: int | None) -> None:
        assert self.bar is not None
        if self.task is not None:
            self.bar.remove_task(self.task)
        self.task = self.bar.add_task(label, total=total, detail="")

    def __enter__(self) -> Self:
        """Listen to warnings and start the live display, if there is one."""
        logging.getLogger("rlhf").addHandler(self)
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop listening, and the live display."""
        logging.getLogger("rlhf").removeHandler(self)
        if self.bar is not None:
            self.bar.stop()
