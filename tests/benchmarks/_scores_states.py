"""Rows of `tests.benchmarks.scale` about scores of a function and about saved states."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf import checkpoint
from rlhf.engines.state_files import write_state
from rlhf.rewards.function import FunctionReward
from rlhf.types import Prompt, Rollout
from tests.benchmarks._rows import Row, Work

CHECK = (
    "import time\n\n\ndef score(prompt, response, metadata):\n    time.sleep(0.01)\n    return float(len(response))\n"
)
WORKERS = 8
MEBI = 2**18
"""Numbers of float32 in a MiB."""


def scores(count: int, folder: Path) -> Work:
    """Score responses with a function that takes 10 ms each, in eight processes."""
    (folder / "check.py").write_text(CHECK, encoding="utf-8")
    prompt = Prompt("p", (1, 2, 3), "a question")
    source = FunctionReward(f"{folder / 'check.py'}:score", workers=WORKERS)
    drawn = [Rollout(prompt, (1,), (-1.0,), f"response {row}", "stop", 0, row) for row in range(count)]
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
    "function": Row("a function of 10 ms, 8 workers", "responses", (256, 1_024), scores),
    "state": Row("a state written and sealed", "MiB", (256, 1_024), state),
}
