"""Shows that no test needs another: `make alone`, or `python -m tests.alone [--part K/N] [--seed N] [FILE ...]`.

Every test file runs in a process of its own, its tests in random order; then all of them run in one process, files and
tests in random order. A failure is printed with the command that repeats it. Parts cut a long run over several nights.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
NOTHING_TO_RUN = 5
"""The exit code of pytest for a file whose tests are all deselected."""


@dataclass(frozen=True)
class Part:
    """Every `of`-th file, the first of them number `number`; counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read `K/N`; raise `ValueError` for anything else."""
        number, _, of = text.partition("/")
        part = cls(int(number), int(of))
        if not 1 <= part.number <= part.of:
            raise ValueError(text)
        return part

    def of_files(self, files: list[str]) -> list[str]:
        """Return this part of the files."""
        return files[self.number - 1 :: self.of]


def command(files: list[str], seed: int, marks: str) -> list[str]:
    """Return the command that runs these files in one process, in the order that the seed gives."""
    order = ["--random-order-bucket=module", f"--random-order-seed={seed}"]
    return [sys.executable, "-m", "pytest", "-q", "-m", marks, *order, *files]


def passes(files: list[str], seed: int, marks: str) -> bool:
    """Run the files in a fresh process; print a line, and for a failure what pytest said and how to repeat it."""
    began = time.monotonic()
    run = command(files, seed, marks)
    ended = subprocess.run(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    passed = ended.returncode in (0, NOTHING_TO_RUN)
    name = files[0] if len(files) == 1 else f"{len(files)} files together"
    line = f"{'ok' if passed else 'FAILED'}  {name}  {time.monotonic() - began:.0f} s"
    print(line if passed else f"{ended.stdout}\n{line}\n  {shlex.join(run)}", flush=True)
    return passed


def main() -> None:
    """Run the files alone, then together; exit with 1 if anything failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="*", metavar="FILE", help="all test files if none is named")
    options.add_argument("--part", type=Part.parse, default=Part(1, 1), metavar="K/N", help="the K-th of N parts")
    options.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="decides every order")
    options.add_argument("-m", dest="marks", default="not gpu", help="as pytest's")
    options.add_argument("--jobs", type=int, default=min(2, len(os.sched_getaffinity(0))), help="files at a time")
    chosen = options.parse_args()
    every = sorted(str(path.relative_to(ROOT)) for path in TESTS.rglob("test_*.py"))
    files = chosen.part.of_files(chosen.files or every)
    print(f"part {chosen.part.number}/{chosen.part.of}: {len(files)} files, seed {chosen.seed}", flush=True)
    with ThreadPoolExecutor(chosen.jobs) as pool:
        alone = list(pool.map(lambda file: passes([file], chosen.seed, chosen.marks), files))
    together = passes(files, chosen.seed, chosen.marks)
    print(f"{alone.count(False)} of {len(files)} files failed alone; together: {'ok' if together else 'FAILED'}")
    sys.exit(not (together and all(alone)))


if __name__ == "__main__":
    main()
