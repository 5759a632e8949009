"""Damages saved states on disk in every way but forgery, and counts what goes unseen.

Each time one of three states is damaged (or two, where files or folders change places): all of it must be found, and
the newest state must be the newest one that nobody touched. A manifest whose own hash was computed anew is forgery,
which hashes without a secret cannot show.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from rlhf.checkpoint import QUARANTINE, newest, problems, states, write
from rlhf.manifest import MANIFEST
from tests.chaos.row import Row, only

COUNT = 500
KEY = "corrupted"
STEPS = (10, 20, 30)
SIZES = {"policy.safetensors": 20_000, "optimizer.safetensors": 9_000, "state.json": 300, "a/x.bin": 4_000, "b/y": 40}


def run(count: int, rng: random.Random) -> Row:
    """Damage `count` times a fresh copy of three states."""
    undetected = wrong_picks = set_aside = 0
    heard = Heard()
    with heard, tempfile.TemporaryDirectory() as folder:
        whole, root = Path(folder) / "whole", Path(folder) / "state"
        for step in STEPS:
            write(whole, step, KEY, lambda partial: _fill(partial, rng), {"loss": rng.random() * 1e-4, "step": step})
        for number in range(count):
            shutil.copytree(whole, root)
            damage = KINDS[number % len(KINDS)]
            touched = damage(root, rng)
            undetected += sum(not problems(state) for state in touched)
            untouched = [state for state in states(root) if state not in touched]
            found = newest(root, KEY)
            wrong_picks += found is None or found.folder != untouched[-1] or bool(problems(found.folder))
            set_aside += len(list(root.glob(f"{QUARANTINE}*")))
            shutil.rmtree(root)
    unsaid = set_aside - len(heard.said)
    return Row(
        "states damaged on disk",
        f"{count} of {count} detected, the newest whole one used",
        {"damaged": count, "undetected": undetected, "wrong picks": wrong_picks, "set aside unsaid": unsaid},
        undetected == wrong_picks == unsaid == 0,
    )


class Heard(logging.Handler):
    """Keeps what the product warns of, and keeps it off the screen, while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.said.append(record.getMessage())

    def __enter__(self) -> Heard:
        """Listen instead of the screen."""
        log = logging.getLogger("rlhf")
        self.before = log.propagate
        log.propagate = False
        log.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no more."""
        log = logging.getLogger("rlhf")
        log.removeHandler(self)
        log.propagate = self.before


def _fill(folder: Path, rng: random.Random) -> None:
    for name, size in SIZES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(rng.randbytes(size))


def _state(root: Path, rng: random.Random) -> Path:
    return rng.choice(states(root))


def _file(root: Path, rng: random.Random) -> tuple[Path, Path]:
    state = _state(root, rng)
    return state, state / rng.choice([*SIZES, MANIFEST])


def truncate(root: Path, rng: random.Random) -> list[Path]:
    """Cut the end of a file off."""
    state, path = _file(root, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))
    return [state]


def flip(root: Path, rng: random.Random) -> list[Path]:
    """Flip one bit of a file."""
    state, path = _file(root, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return [state]


def delete(root: Path, rng: random.Random) -> list[Path]:
    """Remove a file, or a folder with its files."""
    state, path = _file(root, rng)
    if path.parent != state and rng.random() < 0.5:
        shutil.rmtree(path.parent)
    else:
        path.unlink()
    return [state]


def swap_files(root: Path, rng: random.Random) -> list[Path]:
    """Let two files of a state change places, or the same file of two states."""
    state = _state(root, rng)
    if rng.random() < 0.5:
        first, second = (state / name for name in rng.sample([*SIZES, MANIFEST], 2))
        touched = [state]
    else:
        name, other = rng.choice([*SIZES, MANIFEST]), rng.choice([each for each in states(root) if each != state])
        first, second = state / name, other / name
        touched = [state, other]
    _swap(first, second)
    return touched


def zero(root: Path, rng: random.Random) -> list[Path]:
    """Overwrite a block with zeros, as a disk does that lost it."""
    state, path = _file(root, rng)
    before = path.read_bytes()
    start = rng.randrange(len(before))
    end = min(len(before), start + rng.choice((8, 512, 4096)))
    after = before[:start] + bytes(end - start) + before[end:]
    if after == before:  # these bytes were zeros
        return zero(root, rng)
    path.write_bytes(after)
    return [state]


def swap_folders(root: Path, rng: random.Random) -> list[Path]:
    """Let two states change names."""
    first, second = rng.sample(states(root), 2)
    _swap(first, second)
    return [first, second]


def edit(root: Path, rng: random.Random) -> list[Path]:
    """Change one value of a manifest that stays valid JSON."""
    state = _state(root, rng)
    content = json.loads((state / MANIFEST).read_text())
    name = rng.choice(list(SIZES))
    edits: list[Callable[[], object]] = [
        lambda: content.update(step=content["step"] + 1),
        lambda: content.update(key="another"),
        lambda: content.update(format=content["format"] + 1),
        lambda: content["info"].update(loss=0.0),
        lambda: content["files"].pop(name),
        lambda: content["files"][name].update(size=content["files"][name]["size"] + 1),
        lambda: content["files"][name].update(sha256=rng.randbytes(32).hex()),
        lambda: content["files"].update({"../outside": content["files"][name]}),
        lambda: content.update(sha256=rng.randbytes(32).hex()),
        lambda: content.pop("sha256"),
    ]
    rng.choice(edits)()
    (state / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return [state]


def _swap(first: Path, second: Path) -> None:
    between = first.with_name("between")
    first.rename(between)
    second.rename(first)
    between.rename(second)


KINDS = (truncate, flip, delete, swap_files, zero, swap_folders, edit)


if __name__ == "__main__":
    only(run, COUNT)
