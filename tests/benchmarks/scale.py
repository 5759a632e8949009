"""What breaks first as work grows: the controller of a large run, and rows of work that grows with the data.

    python -m tests.benchmarks.scale [ROW...] [--sizes 20000 100000] [--replicas 10 100 1000] [--ranks 1 16 256]
        [--prompts 8192] [--samples 8] [--rows 1024] [--json out.json]

Without a ROW everything is measured. The rows are those of `tests.benchmarks._rows`, and `step`, the controller of one
PPO step: calls, objects, bytes and CPU seconds.

For `step` the real dispatcher, faces and stage code drive stand-ins for actor handles, so a thousand replicas and 256
ranks need no process. Replicas generate on a virtual clock, each `max_sequences` responses at once, of log-normal
lengths. Two measurements:

- scheduling, at full size, where responses carry their lengths but no contents: what grows with processes and calls;
- contents, for `--rows` sequences with all tokens: what grows with tokens. It is given for those rows and, times the
  ratio, for the whole batch.

Not in it: Ray's own work for a call, about 0.15 ms in the controller (see `ray_overhead`), and the wire.
"""

from __future__ import annotations

import pickle
import resource
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import actors.dispatch
import actors.objects
import actors.rollout
import actors.supervise
from actors.group import RankGroup
from actors.learner import RayModel
from actors.objects import Drawn, Pickled
from actors.rollout import RayRollout
from rlhf.data.collate import collate_rollouts
from rlhf.recipe.base import ModelJudge, PathData
from rlhf.recipe.online_schema import PpoStage
from rlhf.stages.experience import check_rollouts
from rlhf.stages.policy_gradient import objective
from rlhf.types import Experience, Prompt, Sampling, TokenBatch
from tests.benchmarks._figures import command_line, give
from tests.benchmarks._rows import measure, rows
from tests.benchmarks._rows import show as show_rows
from tests.benchmarks._world import (
    MAX_SEQUENCES,
    MAX_TOKENS,
    MEAN_TOKENS,
    TOKEN_S,
    Clockwork,
    Counts,
    Rank,
    Reference,
    Replica,
    World,
    response_lengths,
)

PROMPT_TOKENS = 200
RAY_S = 1.5e-4
STAGE = PpoStage(
    name="ppo",
    kind="ppo",
    policy="sft",
    reward=ModelJudge(kind="model", stage="rm"),
    prompts=PathData(path=Path("prompts.jsonl")),
    steps=1,
    prompts_per_step=1,
)


def prompts_of(count: int) -> list[Prompt]:
    tokens = tuple(range(1000, 1000 + PROMPT_TOKENS))
    return [Prompt(f"p{row}", tokens, "a question", {}) for row in range(count)]


def model(world: World, role: str, ranks: int, rows: int, width: int, measured: int) -> RayModel:
    handles = [Rank(world, rank, ranks, rows, width, measured) for rank in range(ranks)]
    group = RankGroup(role, handles, 60.0)  # type: ignore[arg-type]
    group.building = [Reference() for _ in handles]
    return RayModel(group)


def scheduling(replicas: int, ranks: int, prompts: int, samples: int) -> dict[str, Any]:
    """Measure a step whose responses have no contents, at full size; batches have one column."""
    world = World()
    Clockwork.world = world
    fake_ray = SimpleNamespace(put=world.put, get=world.get)
    with (
        patch.object(actors.dispatch, "SimpleQueue", Clockwork),
        patch.object(actors.objects, "ray", fake_ray),
        patch.object(actors.rollout, "ray", fake_ray),
        patch.object(actors.supervise, "ray", fake_ray),
    ):
        engines = [Replica(world) for _ in range(replicas)]
        rollout = RayRollout(engines, 1e9, max_sequences=MAX_SEQUENCES)  # type: ignore[arg-type]
        rows = prompts * samples
        policy, critic = (model(world, role, ranks, rows, 1, rows) for role in ("policy", "critic"))
        reward = model(world, "reward", max(1, ranks // 8), rows, 1, rows)
        asked = prompts_of(prompts)
        seeds = [[row * samples + k for k in range(samples)] for row in range(prompts)]
        rollout.balance.give_back(0, 0.0, 0, [MEAN_TOKENS])  # what the steps before have taught it
        phases: dict[str, Counts] = {}
        with world.phase() as phases["generate"]:
            rollouts = rollout.generate(asked, Sampling(MAX_TOKENS), seeds).result()
            assert len(rollouts) == rows
        column = torch.zeros(rows, 1)
        batch = TokenBatch(column.long(), column.bool(), column.bool(), column)
        with world.phase() as phases["score"]:
            pending = [policy.logprobs(batch), policy.base_logprobs(batch), reward.scores(batch), critic.values(batch)]
            for waiting in pending:
                waiting.result()
        experience = Experience(batch, column[:, 0], column, column, column, column)
        order = torch.randperm(rows).reshape(4, -1).tolist() * STAGE.epochs
        with world.phase() as phases["learn"]:
            learning = [m.train(experience, objective(STAGE, 0.1), order, 1.0) for m in (policy, critic)]
            for update in learning:
                update.result()
        with world.phase() as phases["publish"]:
            policy.publish(rollout, 1).result()
    tokens = sum(engine.tokens for engine in engines)
    ideal = TOKEN_S * tokens / (replicas * MAX_SEQUENCES)
    table = {name: vars(replace(counts)) for name, counts in phases.items()}
    return {"phases": table, "generate_s": world.now, "ideal_s": ideal, "dealt_s": dealt(replicas, prompts, samples)}


def dealt(replicas: int, prompts: int, samples: int) -> float:
    """Return the virtual seconds of generation where the prompts are dealt out in turn beforehand."""
    world = World()
    engines = [Replica(world) for _ in range(replicas)]
    for row in range(prompts):
        for length in response_lengths(range(row * samples, (row + 1) * samples)).tolist():
            engines[row % replicas]._end(length)
    return max(max(engine.free) for engine in engines)


def contents(rows: int, prompts: int, samples: int) -> dict[str, Any]:
    """Measure what the controller does with every token, for some rows."""
    rng = np.random.default_rng(1)
    lengths = response_lengths(range(rows))
    total = int(lengths.sum())
    drawn = Drawn(
        rng.integers(0, 32000, total, np.int32), rng.standard_normal(total).astype(np.float32), lengths, ["a b"] * rows,
        np.ones(rows, np.bool_), 0,
    )  # fmt: skip
    wire = pickle.dumps(drawn, 5)
    asked = prompts_of(rows)
    seconds: dict[str, float] = {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    clock = time.process_time()

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name] = time.process_time() - clock
        clock = time.process_time()

    rollouts = list(pickle.loads(wire).rollouts(asked, [[row] for row in range(rows)]))
    lap("rollouts from columns")
    check_rollouts(rollouts)
    lap("check_rollouts")
    batch = collate_rollouts(rollouts, 0)
    lap("collate_rollouts")
    Pickled(batch)
    lap("pickle batch")
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    ratio = prompts * samples / rows
    return {
        "rows": rows,
        "tokens": total,
        "batch_bytes": actors.objects.byte_count(batch),
        "cpu_s": seconds,
        "peak_bytes": grown,
        "whole": {
            "cpu_s": {name: ratio * value for name, value in seconds.items()},
            "batch_bytes": ratio * actors.objects.byte_count(batch),
            "response_bytes": ratio * len(wire),
            "peak_bytes": ratio * grown,
        },
    }


def show(runs: list[dict[str, Any]], tokens: dict[str, Any]) -> None:
    """Print both measurements."""
    head = ("replicas", "ranks", "phase", "calls", "objects", "MB out", "MB in", "CPU s", "with Ray's")
    table = Table(*head, title="controller of one PPO step, responses without contents")
    for run in runs:
        for name, counts in run["phases"].items():
            cpu = counts["cpu_s"]
            sizes = (f"{counts[key] / 1e6:.1f}" for key in ("sent", "received"))
            numbers = (str(counts["calls"]), str(counts["objects"]), *sizes)
            row = (str(run["replicas"]), str(run["ranks"]), name, *numbers)
            table.add_row(*row, f"{cpu:.3f}", f"{cpu + RAY_S * counts['calls']:.2f}")
        table.add_section()
    Console(width=110).print(table)
    times = Table("replicas", "ideal s", "dispatched s", "dealt in turn s", title="virtual seconds of generation")
    for run in {run["replicas"]: run for run in runs}.values():
        times.add_row(str(run["replicas"]), *(f"{run[key]:.0f}" for key in ("ideal_s", "generate_s", "dealt_s")))
    Console().print(times)
    work = Table("work on contents", f"CPU s, {tokens['rows']} rows", "CPU s, whole batch")
    for name, value in tokens["cpu_s"].items():
        work.add_row(name, f"{value:.2f}", f"{tokens['whole']['cpu_s'][name]:.1f}")
    Console().print(work)
    whole = tokens["whole"]
    print(*(f"{name} {whole[name] / 1e9:.1f} GB" for name in ("response_bytes", "batch_bytes", "peak_bytes")), sep=", ")


def main() -> None:
    """Measure and print tables, and JSON to a file or the console."""
    arguments = command_line(__doc__)
    arguments.add_argument("--replicas", type=int, nargs="+", default=[10, 100, 1000])
    arguments.add_argument("--ranks", type=int, nargs="+", default=[1, 16, 256])
    arguments.add_argument("--prompts", type=int, default=8192)
    arguments.add_argument("--samples", type=int, default=8)
    arguments.add_argument("--rows", type=int, default=1024)
    arguments.add_argument("row", nargs="*", default=["step", *rows()], metavar="ROW")
    arguments.add_argument("--sizes", type=int, nargs="+", help="instead of each row's own")
    options = arguments.parse_args()
    if unknown := set(options.row) - {"step", *rows()}:
        arguments.error(f"no such row: {min(unknown)}; there are step, {', '.join(rows())}")
    figures: dict[str, Any] = {}
    if grown := [name for name in options.row if name != "step"]:
        measured = [measure(name, size) for name in grown for size in options.sizes or rows()[name].sizes]
        show_rows(measured)
        figures["rows"] = measured
    if "step" in options.row:
        figures |= step(options)
    give(figures, options.json)


def step(options: Namespace) -> dict[str, Any]:
    """Measure the controller of one PPO step."""
    torch.set_num_threads(1)
    sizes = {(replicas, options.ranks[0]) for replicas in options.replicas}
    sizes |= {(options.replicas[-1], ranks) for ranks in options.ranks}
    runs = [
        {"replicas": replicas, "ranks": ranks} | scheduling(replicas, ranks, options.prompts, options.samples)
        for replicas, ranks in sorted(sizes)
    ]
    tokens = contents(options.rows, options.prompts, options.samples)
    show(runs, tokens)
    return {"prompts": options.prompts, "samples": options.samples, "runs": runs, "contents": tokens}


if __name__ == "__main__":
    main()
