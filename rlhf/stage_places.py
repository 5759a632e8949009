"""Where a run folder keeps its stages.

`stages/<name>` holds the finished stage. Until there is one, the stage is made there; once there is one, its successor
is made in `stages/.<name>.new` and takes the name when it is done. What it replaces is kept as `stages/<name>.<key>`,
with the first eight digits of its key. Names of stages have no dot, so a kept folder is never taken for a stage.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlhf.manifest import flush_folder

STAGES = "stages"
DONE = "done.json"
STATES = "state"
NEW = ".new"
SHORT = 8
DAMAGED = "damaged"
"""Stands for the key of a folder that is kept though its `done.json` cannot be read."""


def stage_folder(run: Path, name: str) -> Path:
    """Return the folder of a finished stage, or of one that has never been finished."""
    return run / STAGES / name


def new_place(folder: Path) -> Path:
    """Return where the successor of the finished stage in `folder` is made."""
    return folder.with_name(f".{folder.name}{NEW}")


def place_of_work(folder: Path) -> Path:
    """Return where the stage of `folder` is made, or resumes."""
    new = new_place(folder)
    return new if new.is_dir() or os.path.lexists(folder / DONE) else folder


def stage_folders(run: Path) -> list[Path]:
    """Return the folders `stages/<name>` of a run, by name; neither kept ones nor places of work are among them."""
    root = run / STAGES
    return sorted(path for path in root.iterdir() if "." not in path.name and path.is_dir()) if root.is_dir() else []


def kept_folders(folder: Path) -> list[Path]:
    """Return the kept folders of the stage of `folder`, the one that was replaced last at the end."""
    if not folder.parent.is_dir():
        return []
    found = [path for path in folder.parent.iterdir() if path.name.startswith(f"{folder.name}.") and path.is_dir()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def stage_of(folder: Path) -> str:
    """Return the name of the stage that a folder below `stages` belongs to: `sft` for `.sft.new` and `sft.1a2b3c4d`."""
    return folder.name.removeprefix(".").partition(".")[0]


def set_aside(folder: Path, key: str | None) -> Path:
    """Rename a finished stage to the name under which it is kept, and return that.

    `key` is None where its `done.json` cannot be read.
    """
    name = f"{folder.name.removeprefix('.').removesuffix(NEW)}.{key[:SHORT] if key else DAMAGED}"
    number, kept = 1, folder.with_name(name)
    while os.path.lexists(kept):
        number += 1
        kept = folder.with_name(f"{name}-{number}")
    os.utime(folder)  # tells which was replaced last
    folder.rename(kept)
    return kept


def remove_kept(folder: Path) -> None:
    """Remove a kept folder; what is left of it, should that be interrupted, is none."""
    doomed = folder.with_name(f".{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Remove what is left of kept folders of the stage whose removal was interrupted."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        if path != new_place(folder):
            shutil.rmtree(path, ignore_errors=True)


def rename(source: Path, target: Path) -> None:
    """Rename a folder, and make that and earlier renames beside it durable."""
    source.rename(target)
    flush_folder(target.parent)


def folder_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
