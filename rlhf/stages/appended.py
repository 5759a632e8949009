"""The files that a stage appends to while it works: the state of the stage holds how much of each is committed.

A state is thus small whatever the files hold, and saving it costs the same after the last row as after the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.disk import failures_told
from rlhf.errors import DataError
from rlhf.journal import Journal
from rlhf.roles import Ready

if TYPE_CHECKING:
    from hashlib import _Hash

    from rlhf.roles import Pending

COMMITTED = "committed.json"
STATE_BYTES = 4096
CHUNK = 1 << 20


@dataclass
class Content:
    """The first `size` bytes of a file, and their running sha256."""

    size: int = 0
    digest: _Hash = field(default_factory=hashlib.sha256)

    def take(self, path: Path, end: int) -> None:
        """Hash the file from `size` to `end`, or to its own end if that comes first."""
        with path.open("rb") as file:
            file.seek(self.size)
            while self.size < end and (part := file.read(min(CHUNK, end - self.size))):
                self.digest.update(part)
                self.size += len(part)


class AppendedFiles:
    """Files of JSON lines in a stage's folder, which a `StageRecovery` keeps.

    `append` flushes its rows to disk, so a state that is saved afterwards never refers to rows that a crash can lose.
    `load_state` removes the rows behind the state: their work is done again, and each row is there once.
    """

    def __init__(self, folder: Path, names: Sequence[str], stage: str) -> None:
        """`stage` is the name that people give to `--restart`."""
        self.stage = stage
        self.journals = {name: Journal(folder / name) for name in names}
        self.contents = {name: Content() for name in names}

    def clear(self) -> None:
        """Begin with empty files."""
        for name, journal in self.journals.items():
            with failures_told(journal.path, "cannot be written"):
                journal.path.write_bytes(b"")
            self.contents[name] = Content()

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to a file and flush them. ValueError on a number that is not finite."""
        journal = self.journals[name]
        self.contents[name].take(journal.path, journal.append(rows))

    def state_bytes(self) -> Pending[int]:
        """Return about how many bytes a state takes."""
        return Ready(STATE_BYTES)

    def save_state(self, folder: Path) -> Pending[None]:
        """Write how large each file is, and the sha256 of that content."""
        committed = {
            name: {"size": content.size, "sha256": content.digest.hexdigest()}
            for name, content in self.contents.items()
        }
        (folder / COMMITTED).write_text(json.dumps(committed, indent=1) + "\n", encoding="utf-8")
        return Ready(None)

    def load_state(self, folder: Path) -> Pending[None]:
        """Truncate the files to their committed size; copy them from a state that holds the files themselves.

        DataError, and nothing is truncated, if a file no longer begins with what was committed.
        """
        if not (folder / COMMITTED).exists():
            self._copy(folder)
            return Ready(None)
        committed = json.loads((folder / COMMITTED).read_bytes())
        found = {name: self._checked(name, **committed[name]) for name in self.journals}
        for name, content in found.items():
            path = self.journals[name].path
            if path.stat().st_size > content.size:
                with failures_told(path, "cannot be shortened"):
                    os.truncate(path, content.size)
        self.contents = found
        return Ready(None)

    def _checked(self, name: str, size: int, sha256: str) -> Content:
        """Return the committed content of a file."""
        path, content = self.journals[name].path, Content()
        if path.exists():
            content.take(path, size)
        elif size == 0:
            path.touch()
        if content.size < size or content.digest.hexdigest() != sha256:
            what = f"has {content.size} of its {size} saved bytes" if content.size < size else "was changed"
            raise DataError(
                f"{path}: {what} since the stage was interrupted; put the file back as it was, or begin the stage again"
                f" with --restart {self.stage}"
            )
        return content

    def _copy(self, folder: Path) -> None:
        """Copy the files from a state that an earlier version saved."""
        for name, journal in self.journals.items():
            with failures_told(journal.path, "cannot be written"):
                shutil.copyfile(folder / name, journal.path)
            self.contents[name] = Content()
            self.contents[name].take(journal.path, journal.flush())
