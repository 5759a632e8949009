"""What each part of a learner's speed is worth: DPO steps with one of them changed, beside steps as they come.

    python -m tests.benchmarks.switches [--only NAME ...] [--processes 2] [--repeats 6] [--threads 2] [--json out.json]

The model, the data and the step of the row `dpo` of `tests.benchmarks.peers`: 44M parameters in bfloat16, prompts twice
the completions, skewed lengths, the reference's logprobs computed up front. Each variant runs in fresh processes that
take turns, there and back; two steps of each are warm-up. Figures: the median seconds of a step and of its reference
pass, and the most memory of a process, all as ratios to `as it comes`. Above 1 is slower, or more.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from actors.worker import learner_environment
from rlhf.allocator import GLIBC
from rlhf.engines import scoring
from rlhf.models.flat import flatten
from rlhf.types import TokenBatch
from tests.benchmarks._figures import command_line, give
from tests.benchmarks.peers import ours
from tests.benchmarks.peers.environments import DEFAULT_CACHE
from tests.benchmarks.peers.protocol import interleaved, run_process, step_seconds
from tests.benchmarks.peers.rows import ROWS
from tests.benchmarks.peers.task import Outcome, Task
from tests.benchmarks.peers.workload import build_models, step_examples

WARMUP = 2
PLAIN = "as it comes"
Change = Callable[[], AbstractContextManager[Any]]


def every_position() -> AbstractContextManager[Any]:
    """Have the logits of all positions of the flat row, and pick the scored ones after."""

    def logits(model: nn.Module, batch: TokenBatch, scored: Tensor, temperature: float) -> Tensor:
        flat = flatten(batch)
        return model(**flat.inputs()).logits[0][flat.index[:, :-1][scored[:, 1:]]] / temperature

    both = ExitStack()
    both.enter_context(patch.object(scoring, "_logits", logits))
    both.enter_context(whole_logits())
    return both


def whole_logits() -> AbstractContextManager[Any]:
    """Never form logits in parts."""
    return patch.object(scoring, "_large_head", lambda model, scored: None)


def own_prompts() -> AbstractContextManager[Any]:
    """Give every sequence a prompt of its own."""
    return patch.object(TokenBatch, "families", lambda batch: [[row] for row in range(len(batch))])


def padded() -> AbstractContextManager[Any]:
    """Leave the model's attention as transformers chooses it, for padded batches."""
    return patch("rlhf.engines.learner.use_flat_attention", lambda model: None)


def with_spec(**changed: Any) -> Change:
    """Build learners with other settings."""
    spec = ours.LearnerSpec
    return lambda: patch.object(ours, "LearnerSpec", lambda **given: replace(spec(**given), **changed))


def compiled() -> AbstractContextManager[Any]:
    """Let torch.compile make kernels of what stands between the matrix products of each layer."""

    def build(*given: Any, **settings: Any) -> ours.ModelLearner:
        learner = built(*given, **settings)
        for layer in learner.model.model.layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.forward = torch.compile(part.forward, dynamic=True)
        return learner

    built = ours.learner
    return patch.object(ours, "learner", build)


CHANGES: dict[str, Change] = {
    PLAIN: nullcontext,
    "padded batches": padded,
    "a prompt for each sequence": own_prompts,
    "logits of every position": every_position,
    "logits whole, never in parts": whole_logits,
    "passes of 512 tokens": with_spec(max_tokens_per_microbatch=512),
    "passes of 4096 tokens": with_spec(max_tokens_per_microbatch=4096),
    "gradient_checkpointing": with_spec(gradient_checkpointing=True),
    "float32 weights": with_spec(dtype="float32"),
    "torch.compile between products": compiled,
    "glibc's allocator, huge pages": nullcontext,
    "glibc's allocator as it comes": nullcontext,
}


def environment(variant: str) -> dict[str, str]:
    """Return the environment of a variant's process."""
    found = os.environ | learner_environment()
    if variant.startswith("glibc"):
        found = {name: value for name, value in found.items() if name not in ("LD_PRELOAD", "MALLOC_CONF")}
        found |= GLIBC if variant.endswith("huge pages") else {}
    return found


def run(variant: str, task: Task) -> Outcome:
    """Run a variant in a fresh process."""
    command = [sys.executable, "-m", "tests.benchmarks.switches", "--run", variant]
    return run_process(command, task, environment(variant))


def figures(outcomes: list[Outcome]) -> dict[str, float]:
    """Return what is compared."""
    references = [second for outcome in outcomes for second in outcome.reference_seconds[WARMUP:]]
    peak = median(outcome.peak_bytes for outcome in outcomes)
    return {"step": step_seconds(outcomes, WARMUP), "reference": median(references), "memory": peak}


def main() -> None:
    """Measure, and print or write the ratios."""
    if sys.argv[1:2] == ["--run"]:
        with CHANGES[sys.argv[2]]():
            ours.main(*map(Path, sys.argv[3:]))
        return
    arguments = command_line(__doc__)
    arguments.add_argument("--only", nargs="+", default=list(CHANGES), choices=list(CHANGES), metavar="NAME")
    arguments.add_argument("--processes", type=int, default=2)
    arguments.add_argument("--repeats", type=int, default=6, help="timed steps of each process")
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    causal, scalar = map(str, build_models(DEFAULT_CACHE / "models"))
    steps = [[asdict(example) for example in step] for step in step_examples(ROWS["dpo"], WARMUP + options.repeats)]
    task = Task("dpo", "ours", causal, scalar, options.threads, steps)
    found: dict[str, list[Outcome]] = {}
    for variant in interleaved([PLAIN, *(name for name in options.only if name != PLAIN)], options.processes):
        found.setdefault(variant, []).append(run(variant, task))
        print(f"{variant}: {' '.join(f'{seconds:.2f}' for seconds in found[variant][-1].seconds)}", file=sys.stderr)
    measured = {variant: figures(outcomes) for variant, outcomes in found.items()}
    ratios = {
        variant: {name: value / measured[PLAIN][name] for name, value in values.items()}
        for variant, values in measured.items()
    }
    table = Table("variant", "step", "reference pass", "peak memory")
    for variant, values in ratios.items():
        table.add_row(variant, *(f"{value:.2f}" for value in values.values()))
    Console().print(table)
    give({"ratios": ratios, "measured": measured}, options.json)


if __name__ == "__main__":
    main()
