"""What each part of a learner's speed is worth: DPO steps with one of them off, beside steps with all of them on.

    python -m tests.benchmarks.switches [--rounds 3] [--json FILE]

One random 45M-parameter Llama in bfloat16 for each variant, all cores, 16 pairs a step, prompts twice the responses,
log-normal lengths. Variants take turns, there and back; figures are medians of seconds for each real token, as ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rlhf.algorithms.preference import dpo_loss
from rlhf.bench.batches import Drawer
from rlhf.bench.learners import learner_spec
from rlhf.bench.setting import Setting
from rlhf.engines import scoring
from rlhf.engines.learner import ModelLearner
from rlhf.engines.preference_objectives import Preference
from rlhf.models.flat import flatten
from rlhf.types import PreferenceBatch, TokenBatch
from tests.benchmarks._figures import command_line, give

PAIRS, BATCHES = 16, 3


def each_alone(batch: TokenBatch) -> list[list[int]]:
    """Lay every sequence down with a prompt of its own."""
    return [[row] for row in range(len(batch))]


def all_logits(model: nn.Module, batch: TokenBatch, scored: Tensor, temperature: float) -> Tensor:
    """Send every position through the language-model head, and pick the scored ones after."""
    flat = flatten(batch)
    return model(**flat.inputs()).logits[0][flat.index[:, :-1][scored[:, 1:]]] / temperature


def every_position() -> AbstractContextManager[Any]:
    """Have the logits of all positions."""
    both = ExitStack()
    both.enter_context(patch.object(scoring, "_logits", all_logits))
    both.enter_context(patch.object(scoring, "_large_head", lambda model, scored: None))
    return both


def compiled(learner: ModelLearner) -> None:
    """Let torch.compile make kernels of what stands between the matrix products of each layer."""
    for layer in learner.model.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.forward = torch.compile(part.forward, dynamic=True)


BUILT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "padded batches": lambda: patch("rlhf.engines.learner.use_flat_attention", lambda model: None),
}
STEPPED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a prompt for each sequence": lambda: patch.object(TokenBatch, "families", each_alone),
    "logits at every position": every_position,
    "logits whole, never in parts": lambda: patch.object(scoring, "_large_head", lambda model, scored: None),
}
VARIANTS = ("all on", *STEPPED, *BUILT, "torch.compile between products")


def build(variant: str, setting: Setting) -> ModelLearner:
    """Build a learner for a variant."""
    with BUILT.get(variant, nullcontext)():
        learner = ModelLearner(learner_spec("dpo", setting))
    if variant.startswith("torch.compile"):
        compiled(learner)
    return learner


def seconds(variant: str, learner: ModelLearner, batch: PreferenceBatch) -> float:
    """Make one step and return its seconds for each real token."""
    with STEPPED.get(variant, nullcontext)():
        began = time.perf_counter()
        learner.train(batch, Preference(partial(dpo_loss, beta=0.1)), [range(len(batch))], 1.0)
        return (time.perf_counter() - began) / batch.token_count()


def measure(rounds: int) -> dict[str, float]:
    """Return how many times longer a step takes in each variant than with all on."""
    setting = Setting.of(None)
    drawer = Drawer(32000, 2048)
    batches = [drawer.pairs(PAIRS) for _ in range(BATCHES)]
    learners = {variant: build(variant, setting) for variant in VARIANTS}
    for variant, learner in learners.items():
        for batch in batches:
            seconds(variant, learner, batch)  # kernels, caches, compilation
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for number in range(2 * rounds):
        for variant in VARIANTS[:: -1 if number % 2 else 1]:
            taken[variant] += [seconds(variant, learners[variant], batch) for batch in batches]
    medians = {variant: statistics.median(values) for variant, values in taken.items()}
    return {variant: median / medians["all on"] for variant, median in medians.items()}


def main() -> None:
    """Measure, and print or write the ratios."""
    arguments = command_line(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    found = measure(options.rounds)
    table = Table("variant", "time of a step")
    for variant, ratio in found.items():
        table.add_row(variant, f"{ratio:.2f}")
    Console().print(table)
    give(found, options.json)


if __name__ == "__main__":
    main()
