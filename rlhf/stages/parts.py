"""What a stage has made so far, part by part, on disk: each is there whole or not at all, and is written once.

A part is a safetensors file. It is flushed and renamed before a journal names it with its sha256, and a saved state
says how much of the journal it refers to. So a stage that ends at any moment, by a crash or a power loss too, makes at
most one part again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from rlhf.disk import failures_told
from rlhf.fingerprint import file_digest
from rlhf.journal import Journal
from rlhf.manifest import flush_folder
from rlhf.roles import Pending, Ready

STATE = "parts.json"
STATE_BYTES = 4096


@dataclass(frozen=True)
class Part:
    """Rows `start` to `end` (not included) of a series, in a file."""

    series: str
    start: int
    end: int
    file: str
    sha256: str


class Parts:
    """Series of rows, each made from its beginning on; what a stage's `StageRecovery` keeps."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        """`say` tells people about parts that are damaged."""
        self.folder = folder
        self.say = say
        self.journal = Journal(folder / "parts.jsonl")
        self.made: list[Part] = []
        self.size = 0

    def done(self, series: str) -> int:
        """Return how many rows of a series are made."""
        return max((part.end for part in self.made if part.series == series), default=0)

    def add(self, series: str, end: int, columns: Mapping[str, NDArray[Any]]) -> None:
        """Add the rows of a series up to `end`; the columns are on disk when this returns.

        Raises:
            ResourceError: the disk refuses.
        """
        if not self.made:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.journal.cut(0)
        content = save({name: np.ascontiguousarray(column) for name, column in columns.items()})
        path = self.folder / f"{len(self.made):08d}.safetensors"
        partial = path.with_suffix(".partial")
        with failures_told(path, "cannot be written"):
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            flush_folder(self.folder)
        part = Part(series, self.done(series), end, path.name, hashlib.sha256(content).hexdigest())
        self.size = self.journal.append([asdict(part)])
        self.made.append(part)

    def read(self, series: str, start: int, end: int) -> Iterator[tuple[Columns, int, int]]:
        """Yield the files that hold rows `start` to `end` of a series, each with the first and last row within it."""
        for part in self.made:
            if part.series == series and part.start < end and start < part.end:
                with safe_open(self.folder / part.file, framework="numpy") as file:
                    yield Columns(file), max(start, part.start) - part.start, min(end, part.end) - part.start

    def column(self, series: str, name: str) -> NDArray[Any]:
        """Return one column of all rows of a series."""
        files = self.read(series, 0, self.done(series))
        found = [columns[name] for columns, _, _ in files]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)

    def state_bytes(self) -> Pending[int]:
        """Return about how many bytes a state takes."""
        return Ready(STATE_BYTES)

    def save_state(self, folder: Path) -> Pending[None]:
        """Write how much of the journal is committed."""
        (folder / STATE).write_text(json.dumps({"size": self.size}) + "\n", encoding="utf-8")
        return Ready(None)

    def load_state(self, folder: Path) -> Pending[None]:
        """Take what the state refers to, up to the first part that is damaged; the rest is made again."""
        self.size = json.loads((folder / STATE).read_bytes())["size"]
        short = self.journal.cut(self.size).short
        rows = list(self.journal.rows())
        self.made = list(self._whole(rows))
        if short or len(self.made) < len(rows):
            self.say(f"goes back to part {len(self.made)}: what comes after it in {self.folder} is damaged or missing")
            self.journal.cut(0)
            self.size = self.journal.append([asdict(part) for part in self.made])
        return Ready(None)

    def _whole(self, rows: list[dict[str, Any]]) -> Iterator[Part]:
        for row in rows:
            try:
                part = Part(**row)
                if file_digest(self.folder / Path(part.file).name) != part.sha256:
                    return
            except (OSError, TypeError):
                return
            yield part


class Columns(Mapping[str, NDArray[Any]]):
    """The columns of one part; they are read when they are asked for."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a whole column."""
        column: NDArray[Any] = self.file.get_tensor(name)
        return column

    def rows(self, name: str, start: int, end: int) -> NDArray[Any]:
        """Return some rows of a column; the rest is not read."""
        if start == end:  # which safetensors refuses
            return self[name][:0]
        column: NDArray[Any] = self.file.get_slice(name)[start:end]
        return column

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.file.keys())

    def __len__(self) -> int:
        """Return the number of columns."""
        return len(self.file.keys())
