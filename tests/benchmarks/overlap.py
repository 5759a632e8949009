"""What overlapping saves: the step time of both loops, with roles that sleep instead of working.

    python -m tests.benchmarks.overlap [--steps 10] [--json out.json]

The real loops (`rlhf.stages.online.in_turn`, `rlhf.stages.overlap.overlapped`) drive a rollout engine and a policy in
threads of their own. Generating sleeps, and so does learning; the probes of the agreement gate, at every step, sleep
for their share of a response's tokens; publishing takes no time. The step time is the median from the end of one step
to the end of the next, without the first and the last step, which do not overlap with all of their neighbours. The aim
is at most 1.1 times the longer of the two.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

from online_made import stage_of
from overlap_made import training_of

from rlhf.stages.online import in_turn
from rlhf.stages.online_step import Training
from rlhf.stages.overlap import PROBE_TOKENS, overlapped
from tests.benchmarks._figures import command_line, give

WORK_MS = ((100, 400), (200, 400), (300, 400), (400, 400), (400, 300), (400, 200), (400, 100))
RESPONSE_TOKENS = 256
AIM = 1.1


def step_ms(loop: Callable[[Training], object], staleness: int, generate: float, learn: float, steps: int) -> float:
    """Return the median milliseconds of a step; `generate` and `learn` are what these take."""
    takes = {"generate": generate, "probe": generate * PROBE_TOKENS / RESPONSE_TOKENS, "learn": learn, "publish": 0}
    stage = stage_of(
        "grpo",
        steps=steps,
        staleness=staleness,
        prompts_per_step=8,
        samples_per_prompt=8,
        max_response_tokens=RESPONSE_TOKENS,
    )
    with tempfile.TemporaryDirectory() as folder:
        loop(training_of(stage, Path(folder), lambda what, _: time.sleep(1e-3 * takes[what])))
        ends = [json.loads(line)["time"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return 1e3 * statistics.median(after - before for before, after in pairwise(ends[:-1]))


def main() -> None:
    """Measure each pair of durations and print a table, and JSON to a file or the console."""
    arguments = command_line(__doc__)
    arguments.add_argument("--steps", type=int, default=10)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    cases = []
    table = Table("generate", "learn", "in turn", "overlapped", "of the longer", title="ms of a step")
    for generate, learn in WORK_MS:
        case: dict[str, float] = {"generate_ms": generate, "learn_ms": learn}
        case["in_turn_ms"] = step_ms(in_turn, 0, generate, learn, options.steps)
        case["overlapped_ms"] = step_ms(overlapped, 1, generate, learn, options.steps)
        case["of_the_longer"] = case["overlapped_ms"] / max(generate, learn)
        times = (case["in_turn_ms"], case["overlapped_ms"])
        table.add_row(str(generate), str(learn), *(f"{ms:.1f}" for ms in times), f"{case['of_the_longer']:.3f}")
        cases.append(case)
    Console().print(table)
    worst = max(case["of_the_longer"] for case in cases)
    print(f"at most {worst:.3f} times the longer of generating and learning (aim: {AIM})")
    results = {"cases": cases, "worst": worst, "aim": AIM, "steps": options.steps, "cpus": os.cpu_count()}
    give(results, options.json)


if __name__ == "__main__":
    main()
