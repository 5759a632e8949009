"""Rows of `tests.benchmarks.scale` about what stages make and save: rounds, rollouts, instructions, scores, states."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from rlhf import checkpoint
from rlhf.engines.state_files import write_state
from rlhf.rewards.function import FunctionReward
from rlhf.roles import Ready
from rlhf.stages.drawn_ahead import AHEAD, DrawnAhead
from rlhf.stages.online_draw import Drawing
from rlhf.stages.pool import Pool
from rlhf.types import Prompt, Rollout
from tests.benchmarks._rows import Row, Work

TOKENS = 8192
VOCABULARY = [f"word{number}" for number in range(2_000)]
CHECK = (
    "import time\n\n\ndef score(prompt, response, metadata):\n    time.sleep(0.01)\n    return float(len(response))\n"
)
WORKERS = 8
MEBI = 2**18
"""Numbers of float32 in a MiB."""


def rollouts(count: int, tokens: int) -> list[Rollout]:
    prompt = Prompt("p", (1, 2, 3), "a question")
    ids, logprobs = tuple(range(tokens)), (-1.25,) * tokens
    return [Rollout(prompt, ids, logprobs, f"response {row}", "stop", 0, row) for row in range(count)]


def ahead(count: int, folder: Path) -> Work:
    """Save the rollouts that `staleness: 1` has drawn ahead, and load them."""
    kept = DrawnAhead()
    kept.drawing = Drawing(1, Ready(rollouts(count, TOKENS)))

    def work() -> None:
        kept.save_state(folder).result()
        DrawnAhead().load_state(folder).result()
        assert (folder / AHEAD).stat().st_size > 8 * count * TOKENS

    return work


def instructions(count: int, folder: Path) -> Work:
    """Compare each new instruction with all before it, and take it in."""
    rng = random.Random(count)
    texts = [" ".join(rng.choices(VOCABULARY, k=rng.randint(6, 20))) for _ in range(count)]

    def work() -> None:
        pool = Pool([("first", "write a poem about the sea")])
        for number, text in enumerate(texts):
            pool.nearest(text)
            pool.add(f"i{number}", text)

    return work


def scores(count: int, folder: Path) -> Work:
    """Score responses with a function that takes 10 ms each, in eight processes."""
    (folder / "check.py").write_text(CHECK, encoding="utf-8")
    source, drawn = FunctionReward(f"{folder / 'check.py'}:score", workers=WORKERS), rollouts(count, 4)
    source.score(drawn[:WORKERS]).result()

    def work() -> None:
        assert source.score(drawn).result().shape == (count,)

    return work


def state(count: int, folder: Path) -> Work:
    """Write, seal, flush and rename a state of so many MiB."""
    tensors = [(f"layer{number}", torch.ones(MEBI)) for number in range(count)]

    def work() -> None:
        checkpoint.write(folder, 1, "key", lambda inside: write_state(tensors, inside, "policy", 0, 1), {})

    return work


ROWS = {
    "ahead": Row("rollouts drawn ahead, saved and loaded", "responses of 8,192 tokens", (128, 512), ahead),
    "synthesize": Row("new instructions compared with all", "instructions", (2_000, 8_000), instructions),
    "function": Row("a function of 10 ms, 8 workers", "responses", (256, 1_024), scores),
    "state": Row("a state written and sealed", "MiB", (256, 1_024), state),
}
