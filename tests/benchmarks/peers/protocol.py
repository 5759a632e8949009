"""How two sides are compared: fresh processes in turn, quiet machine, medians, and rows that are void when in doubt."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

import psutil

from actors.worker import learner_environment
from tests.benchmarks.peers.environments import peer_python
from tests.benchmarks.peers.limits import probe
from tests.benchmarks.peers.rows import Row
from tests.benchmarks.peers.task import Arm, Example, Outcome, Task

ROOT = Path(__file__).parents[3]
BUSY, DRIFT = 0.3, 0.15
LOSS, GRADIENT, FLOOR = 0.02, 0.1, 0.005
SAMPLED = 0.02
"""Where responses are sampled, one may end early; the real tokens may be so much fewer."""

TIMEOUT = 900

A = TypeVar("A", bound=str)
Steps = list[list[Example]]


@dataclass(frozen=True)
class Plan:
    """How a comparison is run; `warmup` steps of each process are dropped."""

    threads: int
    repeats: int
    warmup: int
    processes: int
    cache: Path
    models: tuple[Path, Path]
    old_logprobs: str = "recompute"

    @property
    def steps(self) -> int:
        """Steps of one process."""
        return self.warmup + math.ceil(self.repeats / self.processes)


@dataclass
class Measured:
    """All processes of one row: each arm's outcomes, and the reasons why the row does not count."""

    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)


def interleaved(arms: Sequence[A], processes: int) -> list[A]:
    """Return the order of processes: there and back, A B B A, so that a slow drift falls on all arms alike."""
    order: list[A] = []
    for turn in range(processes):
        order += arms if turn % 2 == 0 else arms[::-1]
    return order


def step_seconds(outcomes: Sequence[Outcome], warmup: int, with_reference: bool = False) -> float:
    """Return the median seconds of a step over all processes, warm-up dropped; with the reference's, where told."""
    steps: list[float] = []
    for outcome in outcomes:
        extra = outcome.reference_seconds if with_reference and outcome.reference_seconds else [0.0] * 10**4
        steps += [a + b for a, b in zip(outcome.seconds, extra, strict=False)][warmup:]
    return median(steps)


def disagreement(ours: Outcome, peer: Outcome) -> str | None:
    """Return how two loss curves (2 %) or gradient norms (10 %) differ, or None where they agree.

    Equal weights and equal tokens give equal losses and gradients; what either side does not tell is not compared, but
    one of the two must be there.
    """
    compared = 0
    for name, tolerance in (("losses", LOSS), ("grad_norms", GRADIENT)):
        a, b = getattr(ours, name), getattr(peer, name)
        if not a or not b:
            continue
        compared += 1
        if len(a) != len(b):
            return f"{len(a)} and {len(b)} {name}"
        for step, (x, y) in enumerate(zip(a, b, strict=True)):
            if not abs(x - y) <= tolerance * max(abs(x), abs(y)) + FLOOR:
                return f"{name} of step {step}: {x:.4f} and {y:.4f}"
    return None if compared else "no losses to compare"


def drift(probes: Sequence[float]) -> str | None:
    """Return how far the machine's speed moved, where that is more than 15 %."""
    change = max(probes) / min(probes) - 1
    return f"the GEMM ceiling drifted by {change:.0%}" if change > DRIFT else None


def busiest(before: Mapping[int, float], after: Mapping[int, float], seconds: float) -> float:
    """Return the cores that the busiest process used, from CPU seconds by process before and after."""
    return max((used - before.get(pid, 0.0) for pid, used in after.items()), default=0.0) / seconds


def cpu_seconds() -> dict[int, float]:
    """Return the CPU seconds of every other process; this one and its children are left out."""
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    found = {}
    for process in psutil.process_iter(["cpu_times"]):
        times = process.info["cpu_times"]
        if process.pid not in own and times is not None:
            found[process.pid] = times.user + times.system
    return found


def measure(row: Row, steps: Steps, arms: Sequence[Arm], plan: Plan, say: Callable[[str], None]) -> Measured:
    """Run all processes of a row; what makes it void is among the reasons, and the numbers are there all the same."""
    found = Measured(outcomes={arm: [] for arm in arms}, probes=[probe(plan.threads)])
    expected = sum(row.tokens(step) for step in steps)
    for arm in interleaved(arms, plan.processes):
        before, started = cpu_seconds(), time.perf_counter()
        outcome = run_arm(row, arm, steps, plan)
        wall = time.perf_counter() - started
        used = busiest(before, cpu_seconds(), wall)
        if used > BUSY:
            found.reasons.append(f"another process used {used:.1f} cores during {arm}")
        if abs(outcome.tokens - expected) > (0 if row.completions else SAMPLED * expected):
            found.reasons.append(f"{arm} saw {outcome.tokens} real tokens of {expected}")
        found.outcomes[arm].append(outcome)
        found.probes.append(probe(plan.threads))
        say(f"{row.name:7} {arm:9} {wall:5.0f} s, steps {' '.join(f'{s:.2f}' for s in outcome.seconds)}")
    if moved := drift(found.probes):
        found.reasons.append(moved)
    for arm in arms:
        reason = disagreement(found.outcomes["ours"][0], found.outcomes[arm][0])
        if reason:
            found.reasons.append(f"ours and {arm} differ: {reason}")
    return found


def run_arm(row: Row, arm: Arm, steps: Steps, plan: Plan) -> Outcome:
    """Run one process in the environment that our workers have, whichever side it is."""
    python = sys.executable if arm == "ours" else str(peer_python(row.peer, plan.cache))
    module = "tests.benchmarks.peers." + ("ours" if arm == "ours" else "trl_arm")
    causal, scalar = plan.models
    examples = [[asdict(e) for e in step] for step in steps]
    task = Task(row.name, arm, str(causal), str(scalar), plan.threads, examples, plan.old_logprobs)
    return run_process([python, "-m", module], task, os.environ | learner_environment())


def run_process(command: Sequence[str], task: Task, environment: Mapping[str, str]) -> Outcome:
    """Run a command with the files of a task and of its outcome, on the task's threads; RuntimeError where it fails."""
    environment = {**environment, "OMP_NUM_THREADS": str(task.threads)}
    with tempfile.TemporaryDirectory() as folder:
        task_file, outcome_file = Path(folder) / "task.json", Path(folder) / "outcome.json"
        task.write(task_file)
        whole = [*command, str(task_file), str(outcome_file)]
        ended = subprocess.run(whole, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
        if ended.returncode:
            raise RuntimeError(f"{task.row}, {task.arm}, ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
        return Outcome.read(outcome_file)
