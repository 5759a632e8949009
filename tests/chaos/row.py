"""What one kind of fault did: a row of the table that `python -m tests.chaos` prints."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Row:
    """`counts` are in words for people, such as `{"injected": 200, "lost": 0}`; `passed` says that the aim was met."""

    name: str
    aim: str
    counts: dict[str, int]
    passed: bool

    def __str__(self) -> str:
        """Return the row in one line."""
        said = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        return f"{'ok' if self.passed else 'MISSED'}  {self.name}: {said} (aim: {self.aim})"


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a run that shares the machine: one thread, and Ray's workers as urgent as others."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_worker_niceness": "0"} | more


def pinned(row: int) -> Callable[[], None]:
    """Return what keeps a process on one core, so that runs of two rows do not wait for each other's threads."""
    cores = sorted(os.sched_getaffinity(0))
    return partial(os.sched_setaffinity, 0, {cores[row % len(cores)]})


def measure(name: str, share: float, seed: int) -> tuple[Row, float]:
    """Run one row; return it and its seconds."""
    module = importlib.import_module(f"tests.chaos.{name}")
    began = time.monotonic()
    row = module.run(max(1, round(module.COUNT * share)), random.Random(seed))
    return row, time.monotonic() - began


def only(run: Callable[[int, random.Random], Row], count: int) -> None:
    """Run one row from the command line: `--count` faults, in the order that `--seed` gives."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--count", type=int, default=count)
    arguments.add_argument("--seed", type=int, default=17)
    options = arguments.parse_args()
    row = run(options.count, random.Random(options.seed))
    print(row)
    raise SystemExit(not row.passed)
