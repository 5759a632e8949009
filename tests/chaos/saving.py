"""Interrupts a save at every one of its I/O calls, and counts what cannot be read or is not what was saved.

The faults: the disk is full for one call; the disk fails from that call on; the process is killed there; the power
fails there, and what was not flushed is lost. After each, the newest state must be the one before the save or the
saved one, byte by byte, nothing may need to be set aside, and the next save must succeed.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rlhf.checkpoint import QUARANTINE, newest, write
from rlhf.errors import ResourceError
from rlhf.manifest import MANIFEST, Seal, seal_file
from tests.chaos._disk import DIED, FaultyDisk
from tests.chaos.row import Row, only

COUNT = 900
KEY = "interrupted"
MEMORY = Path("/dev/shm")  # where there is one: the power fails in a model of it, real flushes only take time
HANG_S = 20
NAMES = ("policy/adapter.bin", "policy/config.json", "critic/head.bin", "optimizer.bin", "state.json")
FAULTS: dict[str, tuple[int | str, bool]] = {
    "disk full once": (errno.ENOSPC, False),
    "disk dead": (errno.EIO, True),
    "killed": ("kill", False),
    "power lost": ("power", False),
}
CASES = {"after an older state": 2, "over a state of the same step": 1}  # the step that is saved; step 1 is there


def run(count: int, rng: random.Random) -> Row:
    """Interrupt `count` saves, or as many as there are calls to interrupt, each of them once with every fault."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        before = Path(folder) / "before"
        write(before, 1, KEY, _fill(b"old"), {"of": "old"})
        (before / ".partial-step-00000002-0123abcd").mkdir()
        (before / ".partial-step-00000002-0123abcd" / "half").write_bytes(b"half")
        calls = {step: _calls(before, Path(folder) / "state", step) for step in CASES.values()}
        places = [(step, at) for step in CASES.values() for at in range(1, calls[step] + 1)]
        points = list(itertools.product(FAULTS, places))
        rng.shuffle(points)
        for fault, (step, at) in points[:count]:
            root = Path(folder) / "state"
            shutil.copytree(before, root)
            disk = FaultyDisk(at, *FAULTS[fault], random.Random(rng.random()))
            seen.update(_interrupted(root, step, disk))
            shutil.rmtree(root)
    faults = ("unreadable", "wrong picks", "set aside", "not stopped", "errors untold", "next save failed")
    wanted = min(count, len(points))
    return Row(
        "saves interrupted at an I/O call",
        f"{wanted} (of {len(places)} calls, {len(FAULTS)} faults at each): 0 unreadable, 0 wrong picks",
        {"interrupted": seen["interrupted"]} | {name: seen[name] for name in faults},
        seen["interrupted"] == wanted and not any(seen[name] for name in faults),
    )


def _calls(before: Path, root: Path, step: int) -> int:
    """Return the number of I/O calls of a save that nothing interrupts."""
    shutil.copytree(before, root)
    with FaultyDisk(0, "kill", False, random.Random()) as disk:
        write(root, step, KEY, _fill(b"new"), {"of": "new"})
    shutil.rmtree(root)
    return disk.calls


def _interrupted(root: Path, step: int, disk: FaultyDisk) -> list[str]:
    """Save under a fault and return what was seen."""
    logging.disable(logging.WARNING)  # of what could not be removed
    try:
        ended = _in_child(root, step, disk) if isinstance(disk.fault, str) else _here(root, step, disk)
        seen = ["interrupted"] if ended in ("died", "told", "untold", "struck") else ["not stopped"]
        seen += ["errors untold"] if ended == "untold" else []
        found = newest(root, KEY)
        if found is None:
            seen.append("unreadable")
        else:
            of, files = found.info["of"], _files(found.folder)
            known = found.step == (step if of == "new" else 1) and files == _files_of(of.encode())
            seen += [] if known and (of == "new" or ended != "struck") else ["wrong picks"]
        seen += ["set aside"] * len(list(root.glob(f"{QUARANTINE}*")))
        write(root, 3, KEY, _fill(b"next"), {"of": "next"})
        after = newest(root, KEY)
        clean = not list(root.glob(".partial-*"))
        seen += (
            []
            if after and after.step == 3 and _files(after.folder) == _files_of(b"next") and clean
            else ["next save failed"]
        )
    finally:
        logging.disable(logging.NOTSET)
    return seen


def _here(root: Path, step: int, disk: FaultyDisk) -> str:
    """Save in this process; "struck" says that the save succeeded in spite of the fault."""
    try:
        with disk:
            write(root, step, KEY, _fill(b"new"), {"of": "new"})
    except ResourceError as error:
        return "told" if str(root) in str(error) else "untold"
    except OSError:
        return "untold"
    return "struck" if disk.struck else "passed"


def _in_child(root: Path, step: int, disk: FaultyDisk) -> str:
    """Save in a process that really dies."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(HANG_S)
            with disk:
                write(root, step, KEY, _fill(b"new"), {"of": "new"})
        finally:
            os._exit(0)
    return "died" if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == DIED else "passed"


def _files_of(of: bytes) -> dict[str, bytes]:
    return {name: (of + name.encode()) * (1 + 100 * number) for number, name in enumerate(NAMES)}


def _fill(of: bytes) -> Callable[[Path], dict[str, Seal]]:
    """Return what writes the files; some are sealed by their writer, as ranks do, and some are left to the reader."""

    def fill(folder: Path) -> dict[str, Seal]:
        for name, data in _files_of(of).items():
            if not (folder / name).parent.exists():
                (folder / name).parent.mkdir()
            with open(folder / name, "wb") as file:
                file.write(data[:50])
                file.write(data[50:])
        return {name: seal_file(folder / name) for name in NAMES[:2]}

    return fill


def _files(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != MANIFEST}


if __name__ == "__main__":
    only(run, COUNT)
