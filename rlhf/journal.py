"""Append-only files of JSON lines: what `append` has written survives a crash, and a torn last line is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.disk import failures_told


@dataclass(frozen=True)
class Cut:
    """What `Journal.cut` removed or missed: `rows` left, and whether the file was shorter than the offset asked for."""

    rows: int
    short: bool


class Journal:
    """A file with one JSON object a line. One process writes at a time; others may read meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Add rows, flush them to disk, and return the size of the file in bytes, as `cut` takes it.

        ValueError on a number that is not finite; ResourceError when the disk refuses.
        """
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        with failures_told(self.path, "cannot be written"), self.path.open("ab") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
            return file.tell()

    def flush(self) -> int:
        """Flush to disk what any handle has written, and return the file's size in bytes; 0 where there is none."""
        if not self.path.exists():
            return 0
        with failures_told(self.path, "cannot be flushed"), self.path.open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of all whole lines, up to the first that is none: nothing behind a damaged line is used."""
        yield from (row for row, _ in self._whole())

    def cut(self, offset: int | None = None) -> Cut:
        """Shorten the file to its whole lines within the first `offset` bytes, all of them where it is None.

        Never lengthens: a file that is shorter than `offset` keeps the rows that it has, and `short` says so.
        """
        end = rows = 0
        for _, after in self._whole():
            if offset is not None and after > offset:
                break
            end, rows = after, rows + 1
        shorten(self.path, end)
        return Cut(rows, short=offset is not None and end < offset)

    def _whole(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield each whole row with the offset behind it, up to the first line that is torn or damaged."""
        if not self.path.exists():
            return
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                end += len(line)
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    return
                if not line.endswith(b"\n") or not isinstance(row, dict):
                    return
                yield row, end


def shorten(path: Path, end: int) -> None:
    """Cut a file after `end` bytes and flush it, where there is one of another size; `end` is not beyond its own."""
    if path.exists() and path.stat().st_size != end:
        with failures_told(path, "cannot be shortened"), path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
