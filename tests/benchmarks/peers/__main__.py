"""Compares training steps with TRL's on this machine, and says how far both are from what it could do.

    python -m tests.benchmarks.peers [--rows dpo sft reward grpo rloo ppo spread] [--repeats 5] [--json out.json]

The peers' environments are made on the first run. A row is void, with the reason, when another process used more than
0.3 core, the GEMM ceiling drifted by more than 15 %, the two sides saw other tokens, or their losses or gradients
disagree. `--quick` makes one process and two timed steps of each arm: a check that all runs, not a measurement.
"""

from __future__ import annotations

import os
import platform
from dataclasses import replace
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.benchmarks._figures import command_line, give
from tests.benchmarks.peers.environments import DEFAULT_CACHE
from tests.benchmarks.peers.limits import ceiling, probe
from tests.benchmarks.peers.protocol import BUSY, Plan, busiest, cpu_seconds, drift, measure, run_arm
from tests.benchmarks.peers.rows import ROWS, SPREAD, SPREAD_MEAN, SPREAD_ROWS, SPREAD_SIGMAS, Row
from tests.benchmarks.peers.task import Arm, Outcome
from tests.benchmarks.peers.verdict import recorded, settle, settle_spread
from tests.benchmarks.peers.workload import build_models, spread_examples, step_examples


def arms_of(row: Row) -> list[Arm]:
    """Return the arms of a row, ours first."""
    return ["ours", "defaults", "tuned"] if row.tuned else ["ours", "defaults"]


def compare(row: Row, plan: Plan, limit: float, console: Console) -> dict[str, Any]:
    """Measure one row and settle it; where an arm fails the row is void with its error."""
    steps = step_examples(row, plan.steps)
    try:
        found = measure(row, steps, arms_of(row), plan, console.print)
    except (RuntimeError, TimeoutExpired) as error:
        return recorded(row.name, {}, [str(error)], "")
    return settle(row, found, steps, plan, limit)


def spread(plan: Plan, count: int, console: Console) -> dict[str, Any]:
    """Measure our cost per real token of `count` sequences at each spread of lengths, there and back."""
    row = Row("sft", count, 1, 0, 0, 0.0)
    outcomes: dict[float, list[Outcome]] = {sigma: [] for sigma in SPREAD_SIGMAS}
    probes, void = [probe(plan.threads)], []
    order = [*SPREAD_SIGMAS, *SPREAD_SIGMAS[::-1]][: len(SPREAD_SIGMAS) * plan.processes]
    for sigma in order:
        steps = spread_examples(sigma, count, SPREAD_MEAN, plan.steps)
        before = cpu_seconds()
        outcome = run_arm(row, "ours", steps, plan)
        used = busiest(before, cpu_seconds(), sum(outcome.seconds))
        if used > BUSY:
            void.append(f"another process used {used:.1f} cores at sigma {sigma}")
        outcomes[sigma].append(outcome)
        probes.append(probe(plan.threads))
        console.print(f"spread  sigma {sigma}, steps {' '.join(f'{s:.2f}' for s in outcome.seconds)}")
    return settle_spread(dict(outcomes), plan, count * SPREAD_MEAN, probes, [*void, *filter(None, [drift(probes)])])


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the figures as a table; a ratio is our tokens per second over the peer's; void rows are dim."""
    made = Table("row", "ours tokens/s", "x defaults", "x tuned", "of limit ours / peer", "GiB ours / peer", "verdict")
    for row in rows:
        found = row.get("figures") or row.get("unreliable") or {}
        style = "dim" if row["void"] else None
        if "ratio" not in found:
            growth = f"cost per token x {found['growth']:.2f}" if found else ""
            made.add_row(row["row"], growth, "", "", "", "", row["verdict"], style=style)
            continue
        best = "tuned" if "tuned" in found["ratio"] else "defaults"
        made.add_row(
            row["row"],
            f"{found['tokens_per_second']['ours']:.0f}",
            *(f"{found['ratio'][arm]:.1f}" if arm in found["ratio"] else "" for arm in ("defaults", "tuned")),
            *(f"{found[name]['ours']:.2f} / {found[name][best]:.2f}" for name in ("fraction_of_limit", "peak_gib")),
            row["verdict"],
            style=style,
        )
    return made


def main() -> None:
    """Run the rows, print the table and write the figures."""
    options = command_line(__doc__)
    known = [*ROWS, SPREAD]
    options.add_argument("--rows", nargs="+", default=known, choices=known, metavar="ROW", help=", ".join(known))
    options.add_argument("--repeats", type=int, default=5, help="timed steps of each arm, at least")
    options.add_argument("--threads", type=int, default=2, help="of every arm")
    options.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for the peers' environments and the models")
    options.add_argument("--old-logprobs", choices=("recompute", "rollout"), default="recompute", help="as in recipes")
    options.add_argument("--quick", action="store_true", help="one small process of each arm")
    chosen = options.parse_args()
    console = Console()
    models = build_models(chosen.cache / "models")
    plan = Plan(chosen.threads, chosen.repeats, 2, 2, chosen.cache, models, chosen.old_logprobs)
    if chosen.quick:
        plan = replace(plan, repeats=2, warmup=1, processes=1)
    limit = ceiling(chosen.threads)
    console.print(
        f"ceiling {limit / 1e9:.0f} GFLOP/s in bfloat16, {chosen.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    rows = []
    for name in chosen.rows:
        row = ROWS.get(name)
        if row and chosen.quick:
            row = replace(row, examples=max(4 // max(row.completions, 1), 1), prompt=48, completion=24)
        rows.append(
            compare(row, plan, limit, console) if row else spread(plan, 4 if chosen.quick else SPREAD_ROWS, console)
        )
    console.print(table(rows))
    for settled in rows:
        for reason in settled["void"]:
            console.print(f"{settled['row']} is void: {reason}", markup=False)
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": chosen.threads}
    result = {"machine": machine, "ceiling_flops": limit, "load": os.getloadavg(), "quick": chosen.quick}
    result |= {"old_logprobs": chosen.old_logprobs, "rows": rows}
    if chosen.json:
        give(result, chosen.json)


if __name__ == "__main__":
    main()
