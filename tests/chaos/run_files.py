"""Damages the files of run folders one at a time, and asks every command that reads them.

Each file of a finished run, of one whose comparison is still to be made, and of one that was interrupted is truncated,
emptied, and given an unknown neighbour. `rlhf run` must then come to its end, or say in one message what is damaged and
which stage to begin again, and that must work. The other commands must agree with it, without a traceback.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rlhf.errors import RlhfError
from tests.chaos._small_run import Ended, command, copy, go, in_this_process, interrupt, recorded_step, write_recipe
from tests.chaos.row import Row, only

COUNT = 300
FAULTS = ("tracebacks", "without a remedy", "remedies that failed", "different stages", "commands that disagree")
MEMORY = Path("/dev/shm")
REMEDY = re.compile(r"--restart ([a-z]+)")
SCENES = ("finished", "to be compared", "interrupted")
NEIGHBOURS = ("NOTES.txt", ".DS_Store", ".nfs000000000001", "README.md", "model.Q4_0.gguf")


def truncate(path: Path, rng: random.Random) -> None:
    """Cut the end of a file off."""
    os.truncate(path, rng.randrange(max(1, path.stat().st_size)))


def empty(path: Path, rng: random.Random) -> None:
    """Leave nothing of a file."""
    os.truncate(path, 0)


def neighbour(path: Path, rng: random.Random) -> None:
    """Put a file beside it that nobody knows."""
    path.with_name(rng.choice([*NEIGHBOURS, f"{path.name}~"])).write_bytes(rng.randbytes(100))


Damage = Callable[[Path, random.Random], None]


def cases_of(scene: str, folder: Path) -> list[tuple[str, Path, Damage]]:
    """Return what is done to a scene: each file is truncated and emptied, each folder gets a new file."""
    files = [path.relative_to(folder) for path in plain_files(folder)]
    first = {path.parent: path for path in files}
    damaged = [(scene, path, damage) for path in files for damage in (truncate, empty)]
    return damaged + [(scene, path, neighbour) for path in first.values()]


def run(count: int, rng: random.Random) -> Row:
    """Damage `count` files, or each file of each folder once in each way, whichever is less."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as name, in_this_process():
        scenes = {scene: make(Path(name) / scene) for scene in SCENES}
        cases = [case for scene, folder in scenes.items() for case in cases_of(scene, folder)]
        rng.shuffle(cases)
        for scene, path, damage in cases[:count]:
            source = scenes[scene]
            folder = copy(source, source.parent / "damaged")
            damage(folder / path, random.Random(rng.random()))
            found = ask(folder, source)
            seen.update(found)
            if wrong := set(found) & set(FAULTS):
                print(f"{scene}: {path} {damage.__name__}: {', '.join(sorted(wrong))}", file=sys.stderr)
    counts = {"damaged": min(count, len(cases)), "runs that ended well": seen["well"], "messages": seen["said"]}
    return Row(
        "every file of a run folder damaged",
        f"{counts['damaged']} (of {len(cases)}): all resume, or one message with a remedy that works; 0 tracebacks",
        counts | {name: seen[name] for name in FAULTS},
        not any(seen[name] for name in FAULTS),
    )


def make(folder: Path) -> Path:
    """Make the run folder of a scene."""
    write_recipe(folder)
    made = folder / "run"
    if folder.name == "interrupted":
        with recorded_step("dpo", 3, interrupt):
            assert go(made).code == 130
        return made
    assert go(made).code == 0
    if folder.name == "to be compared":
        shutil.rmtree(made / "stages" / "duel")
    return made


def plain_files(folder: Path) -> list[Path]:
    """Return all files below a folder, the lock aside."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")


def ask(folder: Path, source: Path) -> list[str]:
    """Ask every command of a damaged folder, run it, and return what was seen."""
    looked = [command(*words, folder) for words in (("status",), ("runs",), ("checkpoint", "list"))]
    verified = command("checkpoint", "verify", folder)
    before = {stage: taken(folder, stage) for stage in ("sft", "dpo")}
    ended = go(folder)
    seen = []
    for one in (*looked, verified, ended, *before.values()):
        if not one.clean:
            seen.append("tracebacks")
            print(one.said, file=sys.stderr)
    if ended.code == 0:
        refused = [stage for stage, one in before.items() if "is damaged" in one.said]
        return [*seen, "well", *(["commands that disagree"] if refused else []), *same(folder, source)]
    seen.append("said")
    found = REMEDY.search(ended.said)
    if found is None:
        print(ended.said, file=sys.stderr)
        return [*seen, "without a remedy"]
    if found[1] in before and "is damaged" not in before[found[1]].said:
        seen.append("commands that disagree")
    again = go(folder, "--restart", found[1])
    if again.code != 0:
        print(again.said, file=sys.stderr)
    return [*seen, *([] if again.code == 0 else ["remedies that failed"]), *same(folder, source)]


def taken(folder: Path, stage: str) -> Ended:
    """Open a stage as `export`, `serve` and `chat` do."""
    from rlhf.export.source import find_stage

    try:
        find_stage(folder / stage)
    except RlhfError as error:
        return Ended(error.exit_code, str(error))
    except Exception as error:
        return Ended(1, f"Traceback: {error!r}")
    return Ended(0, "")


def same(folder: Path, source: Path) -> list[str]:
    """Compare the models with those of the undamaged run."""
    for file in source.glob("stages/*/model/model.safetensors"):
        made = folder / file.relative_to(source)
        if not made.is_file() or made.read_bytes() != file.read_bytes():
            return ["different stages"]
    return []


if __name__ == "__main__":
    only(run, COUNT)
