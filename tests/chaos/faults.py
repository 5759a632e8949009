"""Mixed faults in tiny PPO and DPO runs, held against a run without any.

Through Ray: processes of the rollout, the reference, the policy and the critic are killed, the rollout is stopped
until its deadline, and the reward server answers with errors. In one process: SIGINT, SIGTERM, SIGKILL while a state
is being written, and a disk that takes no more. Every run must reach its end with each step recorded once, the same
prompts in each, and the same weights bit for bit: float32 on the CPU with the transformers engine is deterministic.
"""

from __future__ import annotations

import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.chaos._run import STEPS, Run, Server
from tests.chaos.row import Row, only

COUNT = 200
LONGEST_S = 300.0
SERVER = ("500", "429", "reset", "timeout")
BURST = 0.4
"""Probability that a fault of the reward server follows another before the run has made a step."""
THROUGH_RAY = {"rollout killed": 10, "reference killed": 7, "policy killed": 4, "critic killed": 4, "rollout hung": 2}
IN_ONE = {"SIGINT": 5, "SIGTERM": 5, "killed while saving": 6, "disk full": 4}
EXPECTED = (130, 143, 4, -9)
WRONG = ("lost or doubled steps", "wrong prompts", "different weights", "hangs", "failed runs", "orphans")


def deck(count: int, shares: dict[str, int], rng: random.Random) -> list[str]:
    """Return so many faults of all kinds, in random order."""
    faults = [name for name, share in shares.items() for _ in range(share)]
    drawn = [faults[index % len(faults)] for index in rng.sample(range(max(count, len(faults))), count)]
    rng.shuffle(drawn)
    return drawn


def moved(run: Run, before: int, seconds: float = LONGEST_S) -> bool:
    """Wait until a run has made a step since, or has ended; return whether it goes on."""
    ends = time.monotonic() + seconds
    while run.ended() is None and run.progress() <= before and time.monotonic() < ends:
        time.sleep(0.05)
    return run.ended() is None and run.progress() > before


def inject(fault: str, run: Run, server: Server, rng: random.Random) -> bool:
    """Inject one fault into a run that is going on; return whether it met it."""
    assert run.process is not None
    time.sleep(rng.uniform(0, 0.3))
    role, _, what = fault.partition(" ")
    if fault in SERVER:
        return met(fault, run, server)
    if fault in ("SIGINT", "SIGTERM"):
        run.process.send_signal(getattr(signal, fault))
    elif fault == "killed while saving":
        return killed_while_saving(run)
    elif fault == "disk full":
        psutil.Process(run.process.pid).rlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    else:
        victims = run.processes(role)
        for victim in victims:
            victim.send_signal(signal.SIGSTOP if what == "hung" else signal.SIGKILL)
        return bool(victims)
    return run.ended() is None


def met(fault: str, run: Run, server: Server) -> bool:
    """Let the reward server's next answer be a fault; return whether the run asked for one."""
    before = server.met
    server.faults.append(fault)
    ends = time.monotonic() + LONGEST_S
    while server.met == before and run.ended() is None and asks(run) and time.monotonic() < ends:
        time.sleep(0.02)
    server.faults.clear()
    return server.met > before


def asks(run: Run) -> bool:
    """Return whether a run is still in PPO, which asks the reward server."""
    return run.progress() < STEPS["ppo"]


def due(faults: list[str], run: Run) -> str | None:
    """Take the next fault that the run can meet where it is: DPO has a policy and nothing else."""
    in_ppo = asks(run)
    for index in reversed(range(len(faults))):
        if in_ppo or faults[index] in IN_ONE or faults[index].startswith("policy"):
            return faults.pop(index)
    return None


def killed_while_saving(run: Run) -> bool:
    """Kill a run at the moment when a state is half written."""
    assert run.process is not None
    ends = time.monotonic() + LONGEST_S
    while run.ended() is None and time.monotonic() < ends:
        if any(run.folder.glob("stages/*/state/.partial-*")):
            run.process.kill()
            return True
    return False


def until_the_end(run: Run, faults: list[str], server: Server, rng: random.Random, wrong: dict[str, int]) -> int:
    """Start a run, again and again where a fault ends it, until it is done; return how many faults it met."""
    count = 0
    run.start()
    while True:
        fault = due(faults, run)
        sooner = fault in SERVER and rng.random() < BURST
        if fault and moved(run, run.progress() - sooner):
            found = inject(fault, run, server, rng)
            count += found
            faults += [] if found else [fault]
            if fault not in IN_ONE:
                continue
        elif fault:
            faults.append(fault)
        code = run.wait(LONGEST_S)
        wrong["hangs"] += code is None
        if code == 0:
            return count
        if code not in (*EXPECTED, None):
            wrong["failed runs"] += 1
            print(f"{run.folder.name}: exit code {code}: {run.last_words()}", file=sys.stderr)
        if run.starts > 2 * COUNT:
            return count
        run.start()


def compare(run: Run, twin: Run, wrong: dict[str, int]) -> None:
    for stage, steps in STEPS.items():
        rows = run.rows(stage)
        wrong["lost or doubled steps"] += [row["step"] for row in rows] != list(range(1, steps + 1))
        wrong["different weights"] += run.sealed(stage) != twin.sealed(stage) or rows != twin.rows(stage)
    wrong["wrong prompts"] += run.prompts() != twin.prompts()
    wrong["orphans"] += len(run.processes(""))


def run(count: int, rng: random.Random) -> Row:
    wrong, met = dict.fromkeys(WRONG, 0), dict.fromkeys(("through Ray", "in one process"), 0)
    runs = 0
    server = Server()
    many = max(1, count // 10)
    decks = {True: deck(many, IN_ONE, rng), False: deck(many, THROUGH_RAY, rng)}
    decks[False] += [rng.choice(SERVER) for _ in range(count - 2 * many)]
    rng.shuffle(decks[False])
    with tempfile.TemporaryDirectory() as name:
        for local, faults in decks.items():
            twin = Run(Path(name) / f"twin-{local}", server, local)
            assert until_the_end(twin, [], server, rng, wrong) == 0
            while faults:
                made = Run(Path(name) / f"run-{runs}", server, local)
                met["in one process" if local else "through Ray"] += until_the_end(made, faults, server, rng, wrong)
                compare(made, twin, wrong)
                runs += 1
    counts = {"injected": sum(met.values()), **met, "runs": runs, **wrong}
    aim = "each step once, the same prompts, the same weights bit for bit"
    return Row("mixed faults", aim, counts, not any(wrong.values()))


if __name__ == "__main__":
    only(run, COUNT)
