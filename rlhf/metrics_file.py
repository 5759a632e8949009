"""`metrics.jsonl` of a stage: one JSON object a line. Rows that were flushed survive a power loss.

A journal (`rlhf.journal`) stops at its first damaged line. A row of metrics does not build on the one before it, so a
damaged line is left out here and the rest is used.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.journal import Journal, shorten

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Recorded:
    """The rows of a file, and the numbers (from 1) of its damaged lines; a torn last line is in neither."""

    rows: list[dict[str, Any]]
    damaged: list[int]


class MetricsFile:
    """The metrics of one stage. One process writes; others may read meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, without flushing it to disk. ValueError on a number that is not finite."""
        line = json.dumps(row, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line)

    def flush(self) -> int:
        """Flush the rows to disk and return the file's size in bytes; 0 if there is no file."""
        return Journal(self.path).flush()

    def read(self) -> Recorded:
        """Return all rows that can be read; nothing where there is no file."""
        rows: list[dict[str, Any]] = []
        damaged: list[int] = []
        pending: int | None = None  # a line that turns out to be torn where no other follows
        for number, (line, _) in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            damaged += [pending] if pending else []
            row = metric_row(line)
            pending = None if row else number
            rows += [row] if row else []
        return Recorded(rows, damaged)

    def cut(self, offset: int) -> Recorded:
        """Shorten the file to its last whole row within the first `offset` bytes, and return what it then holds.

        Never lengthens: a file that is shorter than `offset` keeps the rows that it has.
        """
        end = 0
        for line, after in self._lines():
            if after > offset:
                break
            if line.endswith(b"\n") and metric_row(line):
                end = after
        shorten(self.path, end)
        return self.read()

    def _lines(self) -> Iterator[tuple[bytes, int]]:
        """Yield each line with the offset behind it."""
        if not self.path.exists():
            return
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                end += len(line)
                yield line, end


def metric_row(line: bytes) -> dict[str, Any] | None:
    """Return the row of a line; None where it is torn, damaged, or has no finite number as its step."""
    try:
        row = json.loads(line)
        step = row["step"]
        finite = isinstance(step, int | float) and math.isfinite(step)
        numbers(row)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return row if finite and isinstance(row, dict) else None


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a row that are numbers, by name; what was not finite is null in the file and left out."""
    return {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
