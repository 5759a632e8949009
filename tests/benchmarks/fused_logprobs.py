"""Log-probabilities of tokens without a full logits tensor against plain logits: time and memory, on the CPU.

    python -m tests.benchmarks.fused_logprobs [--only 2048x512x32000 ...] [--rounds 5] [--threads 2] [--json out.json]

Each row is a size (tokens x hidden x vocabulary), a dtype and what learns: hidden states and weight, hidden states
alone (a frozen head), or nothing (scoring). The arms are given the same tensors and the same upstream gradients:

    plain     functional.linear, float32, cross_entropy(reduction="none")
    fused     rlhf.algorithms.linear_logprobs
    anew      the same, keeping no probabilities for the weight's gradient, where the weight learns
    torch     functional.linear_cross_entropy(reduction="none") with its default chunks, where the weight learns

Times are medians of forward and backward over the rounds, the arms in turn (A B C C B A) after one round that is
dropped, in one process with the allocator settings of a role's process. Memory is the most bytes of tensors that live
at once beyond those given, gradients included, counted by torch's profiler in a round of its own: the allocator and
what libraries hold inside a kernel are not in it. Ratios are to plain: below 1 is faster, or less.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions, functional

from actors.worker import learner_environment
from rlhf.algorithms import linear_logprobs
from tests.benchmarks._figures import command_line, give

ROOT = Path(__file__).parents[2]
SIZES = {"2048x512x32000": (2048, 512, 32000), "512x576x49152": (512, 576, 49152), "256x64x262": (256, 64, 262)}
DTYPES = ("bfloat16", "float32")
LEARNS = ("both", "hidden", "nothing")
KEPT_BYTES = linear_logprobs.KEPT_BYTES
CHILD = "FUSED_LOGPROBS_CHILD"
SHORT_S = 0.02

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="none")


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    linear_logprobs.KEPT_BYTES = KEPT_BYTES
    return linear_logprobs.linear_logprobs(hidden, weight, targets)


def anew(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    linear_logprobs.KEPT_BYTES = 0
    return linear_logprobs.linear_logprobs(hidden, weight, targets)


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = LinearCrossEntropyOptions()
    return -functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def arms_of(learns: str) -> dict[str, Logprobs]:
    """Return what is compared, plain first."""
    more = {"anew": anew, "torch": of_torch} if learns == "both" else {}
    return {"plain": plain, "fused": fused, **more}


def tensors(size: tuple[int, int, int], dtype: torch.dtype, learns: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states, weight, targets and upstream gradients; logits spread as a trained model's."""
    tokens, width, vocabulary = size
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_(learns != "nothing")
    weight = (2 / width**0.5 * torch.randn(vocabulary, width, generator=generator)).to(dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight.requires_grad_(learns == "both"), targets, torch.randn(tokens, generator=generator)


def pass_through(logprobs: Logprobs, hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
    """Go forward, and backward where something learns."""
    values = logprobs(hidden, weight, targets)
    if values.requires_grad:
        values.backward(upstream.to(values.dtype))
    hidden.grad = weight.grad = None
    return values.detach()


def seconds(run: Callable[[], Any], times: int) -> float:
    """Return the seconds of one of `times` runs."""
    began = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - began) / times


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that lived at once, beyond those before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def measure(size: tuple[int, int, int], dtype: str, learns: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return every arm's median seconds, peak bytes, both as ratios to plain, and its distance from plain."""
    given = tensors(size, getattr(torch, dtype), learns)
    arms = arms_of(learns)
    runs = {name: (lambda logprobs=logprobs: pass_through(logprobs, *given)) for name, logprobs in arms.items()}
    values = {name: run() for name, run in runs.items()}
    times = {name: max(1, int(SHORT_S / seconds(run, 1))) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 == 0 else reversed(runs):
            taken[name].append(seconds(runs[name], times[name]))
    found = {}
    for name, run in runs.items():
        run_s, peak = statistics.median(taken[name]), peak_bytes(run)
        apart = float((values[name] - values["plain"]).abs().max())
        found[name] = {"seconds": run_s, "peak_bytes": peak, "furthest_from_plain": apart}
    base = dict(found["plain"])
    for figures in found.values():
        figures["time_ratio"] = figures["seconds"] / base["seconds"]
        figures["memory_ratio"] = figures["peak_bytes"] / base["peak_bytes"]
    return found


def show(results: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title="logprobs: forward and backward")
    for column in ("tokens x hidden x vocabulary", "dtype", "learns", "arm"):
        table.add_column(column)
    for column in ("ms", "to plain", "peak MiB", "to plain", "furthest from plain"):
        table.add_column(column, justify="right")
    for row in results:
        for arm, figures in row["arms"].items():
            table.add_row(
                *(row[key] if arm == "plain" else "" for key in ("size", "dtype", "learns")),
                arm,
                f"{1e3 * figures['seconds']:,.2f}",
                f"{figures['time_ratio']:.2f}",
                f"{figures['peak_bytes'] / 2**20:,.1f}",
                f"{figures['memory_ratio']:.2f}",
                f"{figures['furthest_from_plain']:.1e}",
                end_section=arm == list(row["arms"])[-1],
            )
    Console().print(table)


def main() -> None:
    """Measure in a process with a role's allocator; print the table, and JSON to a file or the console."""
    parser = command_line(__doc__)
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=list(SIZES), metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if CHILD not in os.environ:
        command = [sys.executable, "-m", "tests.benchmarks.fused_logprobs", *sys.argv[1:]]
        environment = os.environ | learner_environment() | {CHILD: "1", "OMP_NUM_THREADS": str(options.threads)}
        sys.exit(subprocess.run(command, cwd=ROOT, env=environment).returncode)
    results = [
        {"size": size, "dtype": dtype, "learns": learns, "arms": measure(SIZES[size], dtype, learns, options.rounds)}
        for size in options.only
        for dtype in DTYPES
        for learns in LEARNS
    ]
    show(results)
    give(results, options.json)


if __name__ == "__main__":
    main()
