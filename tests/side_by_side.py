"""Runs all tests that need no GPU: `make test`, or `python -m tests.side_by_side`.

Tests of Ray and vLLM wait most of the time, for deadlines and for processes to end. So two lanes of them run beside the
others, which take what the lanes leave of the processors. Files that take long begin first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CORES = len(os.sched_getaffinity(0))

LONGEST = (
    "actors/test_cluster", "actors/test_slurm", "actors/test_rank_groups", "actors/test_launch",
    "actors/test_ray_head", "actors/test_adapters", "actors/test_judge", "actors/test_actor_progress",
    "actors/test_restarts", "actors/test_connect", "actors/test_weights", "stages/test_tuning_stages",
    "actors/test_supervise", "bench/test_bench_cluster", "serving/test_serve", "actors/test_two_nodes",
    "engines/test_rank_invariance", "engines/test_learner_ranks", "stages/test_online_methods", "test_api",
    "stages/test_preference_methods", "stages/test_synthesize", "chaos/test_chaos_resume", "engines/test_state",
    "recipe/test_memory_measured", "stages/test_overlap", "bench/test_measured", "data/test_store", "data/test_workers",
    "engines/test_ranks", "engines/test_served", "engines/test_torch_engine", "models/test_flat",
    "chaos/test_chaos_run_folder", "chaos/test_chaos_inputs", "chaos/test_chaos_hostile", "stages/test_classify",
)  # fmt: skip
"""The files that take longest, those of Ray before the others."""


@dataclass(frozen=True)
class Group:
    """Tests of one kind, each file in one of `workers` processes; `options` are pytest's."""

    name: str
    marks: str
    files: list[str]
    workers: int
    prefix: tuple[str, ...] = ()
    options: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """Return the command that runs this group's tests, files in their order."""
        pytest = [*self.prefix, sys.executable, "-m", "pytest", "-q", "-m", self.marks]
        xdist = [f"--numprocesses={self.workers}", "--dist=loadfile", "--no-loadscope-reorder"]
        return [*pytest, *xdist, *self.options, *self.files]


def every_file() -> list[str]:
    """Return all test files, those that take longest first."""
    rank = {f"tests/{name}.py": place for place, name in enumerate(LONGEST)}
    files = sorted(str(path.relative_to(ROOT)) for path in TESTS.rglob("test_*.py"))
    return sorted(files, key=lambda file: rank.get(file, len(rank)))


def uses_ray(file: str) -> bool:
    """Return whether a test file has tests of Ray or vLLM; the lanes need not import any other."""
    return bool(re.search(r"mark\.(ray|vllm)\b", (ROOT / file).read_text(encoding="utf-8")))


def groups() -> list[Group]:
    """Return the lanes of Ray, and the tests beside them."""
    every = every_file()
    return [
        Group("ray", "(ray or vllm) and not gpu", [*filter(uses_ray, every)], 2),
        Group("plain", "not (gpu or ray or vllm)", every, min(CORES, 4), ("nice", "-n", "5"), ("--pin",)),
    ]


def follow(group: Group, run: subprocess.Popen[str]) -> None:
    """Print what a group says, each line with its name."""
    for line in run.stdout or ():
        print(f"{group.name:>5} | {line}", end="", flush=True)


def main() -> None:
    """Run both groups with the options given for pytest; exit with 1 if a test failed."""
    began = time.monotonic()
    runs, readers, both = [], [], groups()
    for group in both:
        command = [*group.command(), *sys.argv[1:]]
        runs.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        readers.append(Thread(target=follow, args=(group, runs[-1])))
        readers[-1].start()
    codes = [run.wait() for run in runs]
    for reader in readers:
        reader.join()
    said = ", ".join(f"{group.name} {'failed' if code else 'passed'}" for group, code in zip(both, codes, strict=True))
    print(f"{said} ({(time.monotonic() - began) / 60:.1f} min)")
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
