"""Fails, interrupts, refuses and kills runs in one folder, and looks whether any finished stage is lost.

Every run wants other settings of a small recipe, and meets one fault: a bad data row, a setting that its data cannot
meet, a refused recipe, a signal, a full disk, a stage begun again, death before or after any rename below `stages`.
With `recovery.keep_old` out of reach nothing may be removed: after each run every stage that was ever finished must
still be there, byte for byte.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.stage_places import DONE, STATES
from tests.chaos._disk import FaultyDisk
from tests.chaos._small_run import RECIPE, Ended, go, in_this_process, recorded_step, write_recipe
from tests.chaos.row import Row, only

COUNT = 200
MEMORY = Path("/dev/shm")
DIED = 77
FAULTS = ("lost", "changed", "tracebacks", "wrong ends")
KEEP = ("--set", "recovery.keep_old=10000")
CHANGES = (
    "stages.sft.batch_size=8", "stages.sft.optimizer.learning_rate=0.01", "stages.sft.seed=3", "stages.pairs.seed=5",
    "stages.pairs.max_response_tokens=6", "stages.dpo.beta=0.3", "stages.dpo.seed=4", "stages.dpo.batch_size=4",
)  # fmt: skip
REFUSALS = (
    ("--set", "stages.sft.batch_sise=3"), ("--set", "stages.dpo.policy=stf"), ("--set", "stages.sft.data.path=no"),
    ("--set", "stages.pairs.max_prompt_tokens=1000000"), ("--restart", "nope"),
)  # fmt: skip
REMEDY = re.compile(r"--restart ([a-z]+)")
CALLS = 900
"""About as many calls of the file system does a run make that makes every stage."""

Stages = dict[str, dict[str, str]]


def run(count: int, rng: random.Random) -> Row:
    """Make `count` runs in one folder, then one that nothing disturbs."""
    seen: Counter[str] = Counter()
    blocking = ""
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name, in_this_process():
        folder = Path(name) / "run"
        write_recipe(folder.parent)
        recipe = folder.parent / "recipe.yaml"
        recipe.write_text(RECIPE[: RECIPE.index("  - {name: duel")])
        bad = (folder.parent / "chats.jsonl").read_text() + '{"prompt": "Say cab."}\n'
        (folder.parent / "bad.jsonl").write_text(bad)
        assert go(folder, *KEEP).code == 0
        known = finished(folder)
        for number in range(count):
            fault = FAULTY[number % len(FAULTY)]
            options = [item for change in rng.sample(CHANGES, rng.randrange(3)) for item in ("--set", change)]
            if blocking:  # an interrupted stage with other settings: begun again, or refused once more
                options += ["--restart", blocking] if rng.random() < 0.8 else []
            ended = fault(folder, [*KEEP, *options], rng)
            blocked = REMEDY.search(ended.said) if ended.code == 2 else None
            blocking = blocked[1] if blocked else ""
            wrong = compare(known, found := finished(folder))
            wrong += [] if ended.clean else ["tracebacks"]
            wrong += [] if ended.code in (0, 2, 3, 4, 5, 130, 143, DIED) else ["wrong ends"]
            if wrong:
                print(f"run {number}, {fault.__name__} {options}: {', '.join(wrong)}: {ended}", file=sys.stderr)
            seen.update([*wrong, ENDS.get(ended.code, "failed")])
            known = found
        seen["wrong ends"] += go(folder, *KEEP, "--restart", "sft", "--restart", "pairs", "--restart", "dpo").code != 0
        seen.update(compare(known, known := finished(folder)))
    return Row(
        "finished stages through runs that fail",
        f"{count} failing, interrupted and refused runs: 0 finished stages lost, byte for byte",
        {"runs": count}
        | {name: seen[name] for name in dict.fromkeys(ENDS.values())}
        | {"finished stages": len(known)}
        | {name: seen[name] for name in FAULTS},
        not any(seen[name] for name in FAULTS),
    )


ENDS = {0: "done", 2: "refused", 130: "interrupted", 143: "interrupted", DIED: "killed"} | dict.fromkeys(
    (3, 4, 5), "failed"
)


def finished(folder: Path) -> Stages:
    """Return the digests of all files of every finished stage, by what its `done.json` holds, wherever it lies."""
    found = {}
    for done in folder.glob(f"stages/*/{DONE}"):
        place = done.parent
        files = {path.relative_to(place): path for path in sorted(place.rglob("*")) if path.is_file()}
        found[digest(done)] = {
            str(name): digest(path) for name, path in files.items() if name.parts[0] not in (STATES, f".{STATES}")
        }
    return found


def digest(path: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(known: Stages, found: Stages) -> list[str]:
    """Return what is lost, and what has other bytes than before."""
    lost = ["lost" for key in known if key not in found]
    return lost + ["changed" for key in known.keys() & found.keys() if known[key] != found[key]]


def changed(folder: Path, options: list[str], rng: random.Random) -> Ended:
    """Nothing goes wrong: what changed is made, what comes back is taken back."""
    return go(folder, *options)


def bad_row(folder: Path, options: list[str], rng: random.Random) -> Ended:
    """The last row of the data is bad."""
    return go(folder, *options, "--set", "stages.sft.data.path=bad.jsonl")


def too_short(folder: Path, options: list[str], rng: random.Random) -> Ended:
    """No row of the data is as short as the settings want."""
    return go(folder, *options, "--set", f"stages.{rng.choice(['sft', 'dpo'])}.max_length=8")


def refused(folder: Path, options: list[str], rng: random.Random) -> Ended:
    """The recipe is wrong."""
    return go(folder, *options, *rng.choice(REFUSALS))


def signalled(folder: Path, options: list[str], rng: random.Random) -> Ended:
    """A signal comes while a stage is made."""
    number = rng.choice((signal.SIGINT, signal.SIGTERM))
    stage = rng.choice(("sft", "dpo"))
    options = [*options, "--set", f"stages.{stage}.seed={rng.randrange(1000)}"]
    with recorded_step(stage, rng.randrange(1, 4), lambda: os.kill(os.getpid(), number)):
        return go(folder, *options)


def disk_full(folder: Path, options: list[str], rng: random.Random) -> Ended:
    """The disk takes no more, from some call on, or fails once."""
    options = [*options, "--set", f"stages.sft.seed={rng.randrange(1000)}"]
    with FaultyDisk(rng.randrange(1, CALLS), errno.ENOSPC, rng.random() < 0.5, rng):
        return go(folder, *options)


def begun_again(folder: Path, options: list[str], rng: random.Random) -> Ended:
    """A finished stage begins again, and is perhaps interrupted."""
    stage = rng.choice(("sft", "pairs", "dpo"))
    options = options if stage in options else [*options, "--restart", stage]
    with recorded_step(stage, rng.randrange(1, 9), lambda: os.kill(os.getpid(), signal.SIGINT)):
        return go(folder, *options)


def killed(folder: Path, options: list[str], rng: random.Random) -> Ended:
    """The process dies before or after a rename below `stages`."""
    options = [*options, "--set", f"stages.{rng.choice(['sft', 'pairs', 'dpo'])}.seed={rng.randrange(3)}"]
    at, after, calls, real = rng.randrange(1, 5), rng.random() < 0.5, [0], os.rename

    def rename(source: Any, target: Any) -> None:
        calls[0] += Path(target).parent.name == "stages"
        if calls[0] == at and not after:
            os._exit(DIED)
        real(source, target)
        if calls[0] == at:
            os._exit(DIED)

    child = os.fork()
    if child == 0:
        os.rename = rename
        ended = go(folder, *options)
        os._exit(ended.code if ended.clean else 1)
    return Ended(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "")


FAULTY: tuple[Callable[[Path, list[str], random.Random], Ended], ...] = (
    changed, killed, bad_row, signalled, refused, disk_full, too_short, begun_again, killed, changed,
)  # fmt: skip


if __name__ == "__main__":
    only(run, COUNT)
