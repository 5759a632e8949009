"""`done.json` says that a stage is finished: its key, what it was made from, and the hashes of what it left."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf.checkpoint import QUARANTINE
from rlhf.errors import DataError, ResourceError
from rlhf.manifest import SEALED, broken, flush_folder, shown
from rlhf.stage_places import DAMAGED, SHORT, STAGES, stage_of

CHECKSUM = "sha256"
FILES = "results"
"""The key of `done.json` that holds the digests of single files by name; older versions called it `pairs`."""

CHECKPOINTS = "checkpoints"
"""The folder of models that a stage saved on its way, and the key of `done.json` that holds their files' sizes."""

RESULTS = (
    "pairs.jsonl", "best.jsonl", "data.jsonl", "rejected.jsonl", "evaluation.json", "report.json", "report.html",
    "leaderboard.csv",
)  # fmt: skip
"""Files beside the model that later stages, the reports and people read."""


class Damaged(DataError):
    """A finished stage is not as it was made; the message names the file and the remedy."""


def damaged(folder: Path, wrong: str, key: str | None = None) -> Damaged:
    """Return the error that every command gives of a finished stage in which something is wrong.

    `key` is the stage's, None where it cannot be read.
    """
    name = stage_of(folder)
    aside = f"{name}.{key[:SHORT] if key else DAMAGED}"
    return Damaged(
        f"{shown(str(folder))} is damaged ({wrong}); put the file back, or make the stage again with"
        f" `rlhf run RECIPE --restart {name}`, which keeps what is there as {STAGES}/{aside}"
    )


def write_done(file: Path, content: Mapping[str, Any]) -> None:
    """Write a `done.json` with its own checksum: it is there whole and on disk, or not at all."""
    body = json.loads(json.dumps(dict(content)))
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        out.write(json.dumps(body | {CHECKSUM: _digest(body)}, indent=2) + "\n")
        out.flush()
        os.fsync(out.fileno())
    partial.rename(file)
    flush_folder(file.parent)


def read_done(file: Path) -> dict[str, Any]:
    """Return what a `done.json` says; Damaged where it is not as it was written."""
    try:
        done = json.loads(file.read_bytes())
        body = {name: value for name, value in done.items() if name != CHECKSUM}
        intact = done.get(CHECKSUM) in (None, _digest(body))  # older versions wrote none
        if intact and isinstance(done["key"], str) and isinstance(done["content"]["stage"]["kind"], str):
            return body
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise damaged(file.parent, f"{file.name}: truncated or changed")


def file_digests(folder: Path) -> dict[str, str]:
    """Flush the single files that a stage left and return their sha256 by name."""
    return {name: _file_digest(folder / name, flush=True) for name in RESULTS if (folder / name).is_file()}


def checkpoint_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each file of a stage's intermediate checkpoints; hashes would take long."""
    root = folder / CHECKPOINTS
    files = sorted(path for path in root.glob("step-*/**/*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in files}


def quarantine_checkpoints(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Rename the checkpoints of an unfinished stage that are not as large as they were, and return them in words."""
    found = []
    for name in dict.fromkeys(name.partition("/")[0] for name in sizes):
        root = folder / CHECKPOINTS
        mine = {file: size for file, size in sizes.items() if file.startswith(f"{name}/")}
        if wrong := list(_damaged_checkpoints(root, mine)):
            (root / name).rename(root / f"{QUARANTINE}{name}")
            found.append(f"{wrong[0].partition(';')[0]}; it is now {QUARANTINE}{name}, and a comparison lacks it")
    return found


def damage(folder: Path, done: Mapping[str, Any]) -> list[str]:
    """Return in words what in a finished stage differs from what its `done.json` says; other files do not matter."""
    seals = {name: done[key] for name, key in SEALED.items() if done.get(key)}
    found = [f"{name}/{line}" for name, files in seals.items() for line in broken(folder / name, files)]
    for name, digest in (done.get(FILES) or done.get("pairs") or {}).items():
        file = folder / name
        if not file.is_file():
            found.append(f"{shown(name)}: missing")
        elif _file_digest(file) != digest:
            found.append(f"{shown(name)}: changed")
    return found + list(_damaged_checkpoints(folder / CHECKPOINTS, done.get(CHECKPOINTS) or {}))


def _damaged_checkpoints(root: Path, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield what is wrong with checkpoints; one that was removed as a whole, to save space, is not missed."""
    for name, size in sizes.items():
        step, file = name.partition("/")[0], root / name
        found = file.stat().st_size if file.is_file() else None
        if found != size and (root / step).is_dir():
            wrong = "missing" if found is None else f"{found} of {size} bytes"
            yield f"{CHECKPOINTS}/{shown(name)}: {wrong}; {CHECKPOINTS}/{shown(step)} as a whole can be removed"


def _file_digest(path: Path, flush: bool = False) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if flush:
                os.fsync(file.fileno())
            return digest
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError | ResourceError:
    """Return the error for what may be whole and only cannot be read now, and that for what is no file at all."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        return damaged(path.parent, f"{path.name}: {(error.strerror or 'unreadable').lower()}")
    return ResourceError(f"{path}: cannot be read: {error.strerror}; mend that and run again, nothing is lost")


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
