"""Interrupts real runs at random moments: what is left is a whole state or nothing, and no process.

`rlhf run` in a process of its own, a fifth of them through Ray, gets SIGINT or SIGTERM at a random moment, some a
second time. Afterwards every process that it started must be gone, every state on disk must be whole, and the same
command goes on from there, interrupted again and again, until it reaches the end; its weights must be those of an
undisturbed run.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from rlhf.checkpoint import problems, states
from tests.chaos.row import Row, environment, only, pinned

COUNT = 50
FAULTS = ("damaged", "orphans", "wrong exit codes", "hangs", "different weights")

RECIPES = Path(__file__).parents[2] / "recipes"
MARK = "RLHF_CHAOS_RUN"
LONGEST_S = 240.0
GONE_S = 20.0
EXPECTED = {signal.SIGINT: (130,), signal.SIGTERM: (143,)}


def command(folder: Path, local: bool) -> list[str]:
    sets = ["stages.ppo.steps=12", "recovery.every_steps=3"]
    options = [item for value in sets for item in ("--set", value)] + ["--local"] * local
    return [sys.executable, "-m", "rlhf.cli", "run", str(RECIPES / "smoke" / "pipeline.yaml"), *options,
            "--output", str(folder)]  # fmt: skip


def start(folder: Path, local: bool, mark: str) -> subprocess.Popen[bytes]:
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(
            command(folder, local),
            env=environment(**{MARK: mark}),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=pinned(1) if local else None,
        )


def marked(mark: str) -> list[psutil.Process]:
    """Return the living processes that carry a run's mark in their environment."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.environ().get(MARK) == mark and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def orphans(mark: str) -> int:
    """Return how many processes of a run are still there after a while, and end them."""
    ends = time.monotonic() + GONE_S
    while (left := marked(mark)) and time.monotonic() < ends:
        time.sleep(0.2)
    for process in left:
        process.kill()
    return len(left)


def saved(folder: Path) -> list[Path]:
    """Return the states on disk."""
    return [state for root in folder.glob("stages/*/state") for state in states(root)]


def weights(folder: Path) -> dict[str, str]:
    """Return the digests of every stage's model."""
    done = {file.parent.name: json.loads(file.read_text()) for file in folder.glob("stages/*/done.json")}
    return {name: json.dumps(content["files"], sort_keys=True) for name, content in done.items()}


def interrupt(folder: Path, local: bool, life: float, rng: random.Random) -> tuple[bool, dict[str, int]]:
    """Run, interrupt at a random moment, perhaps twice; return whether the run came to its end, and what went wrong."""
    mark = f"{folder.name}-{rng.random()}"
    process = start(folder, local, mark)
    chosen, wrong, code = rng.choice(list(EXPECTED)), dict.fromkeys(FAULTS, 0), 0
    try:
        process.wait(rng.uniform(0.05, 0.8) * life)
    except subprocess.TimeoutExpired:
        process.send_signal(chosen)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, 1))
            process.send_signal(chosen)
    try:
        code = process.wait(LONGEST_S)
        # before Python has put its handlers in place a signal ends the process by itself
        if code not in (0, -chosen, *EXPECTED[chosen]):
            wrong["wrong exit codes"] += 1
            print(f"{folder.name}: exit code {code} after {chosen.name}", file=sys.stderr)
    except subprocess.TimeoutExpired:
        wrong["hangs"] += 1
        process.kill()
    wrong["orphans"] += orphans(mark)
    wrong["damaged"] += sum(bool(problems(state)) for state in saved(folder))
    return code == 0, wrong


def run(count: int, rng: random.Random) -> Row:
    totals = {"interrupted": 0, "through Ray": 0, "runs": 0, "with a state on disk": 0, **dict.fromkeys(FAULTS, 0)}
    with tempfile.TemporaryDirectory() as name:
        life, twins = {}, {}
        for local in (True, False):
            twins[local] = Path(name) / f"twin-{local}"
            began = time.monotonic()
            assert start(twins[local], local, "twin").wait(LONGEST_S) == 0
            life[local] = time.monotonic() - began
        while totals["interrupted"] < count:
            local = totals["through Ray"] >= count // 5
            quota = count if local else count // 5
            folder = Path(name) / f"run-{totals['runs']}"
            totals["runs"] += 1
            ended = False
            while not ended and totals["interrupted"] < quota:
                ended, wrong = interrupt(folder, local, life[local], rng)
                totals["interrupted"] += not ended
                totals["through Ray"] += not (ended or local)
                totals["with a state on disk"] += not ended and bool(saved(folder))
                totals = {what: totals[what] + wrong.get(what, 0) for what in totals}
            if not ended:
                totals["wrong exit codes"] += start(folder, local, "end").wait(LONGEST_S) != 0
            totals["different weights"] += weights(folder) != weights(twins[local])
    aim = "a whole state or a clean no-op, no orphan, the same weights in the end"
    return Row("interrupts at random moments", aim, totals, not any(totals[what] for what in FAULTS))


if __name__ == "__main__":
    only(run, COUNT)
