"""Rows of `tests.benchmarks.scale` about what stages sample: annotation, rollouts drawn ahead, new instructions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from rlhf import checkpoint
from rlhf.models.tiny import build_tiny
from rlhf.recipe.role_schema import Roles, RolloutRole
from rlhf.roles import Ready
from rlhf.stages.drawn_ahead import DrawnAhead
from rlhf.stages.online_draw import Drawing
from rlhf.stages.pool import Pool
from rlhf.types import Prompt, Rollout
from tests.benchmarks._rows import Row, Work

sys.path.append(str(Path(__file__).parents[1] / "stages"))  # where the stage's stand-ins are

SAMPLES, TOKENS, LONG = 4, 2000, 8192
VOCABULARY = [f"word{number}" for number in range(20_000)]


def annotation(prompts: int, folder: Path) -> Work:
    """Annotate prompts, four responses of 2,000 tokens to each, by an engine and a judge that take no time."""
    from annotate_made import Bench

    bench = Bench(folder, build_tiny(folder / "model"), prompts, samples_per_prompt=SAMPLES)
    bench.roles = Roles(rollout=RolloutRole(max_sequences=64))
    bench.filling = tuple(range(1000, 1000 + TOKENS))
    return lambda: bench.run("out")


def drawn_ahead(responses: int, folder: Path) -> Work:
    """Save and load a state with responses of 8,192 tokens to prompts of four each."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"p{row}", (1, 2), "question") for row in range(responses // SAMPLES)]

    def rollout(row: int) -> Rollout:
        tokens, logprobs = rng.integers(0, 150_000, LONG), -rng.random(LONG, np.float32)
        text = "word " * 6000
        return Rollout(prompts[row // SAMPLES], tuple(tokens.tolist()), tuple(logprobs.tolist()), text, "stop", 3, row)

    saved = DrawnAhead()
    saved.drawing = Drawing(1, Ready([rollout(row) for row in range(responses)]))

    def work() -> None:
        state = checkpoint.write(folder / "state", 1, "key", lambda place: saved.save_state(place).result(), {})
        loaded = DrawnAhead()
        loaded.load_state(state.folder).result()
        assert loaded.taken_up(1, prompts, ()) is not None

    return work


def instructions(count: int, _: Path) -> Work:
    """Ask for the nearest of each new instruction, and add it, up to a pool of so many."""
    rng = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, len(VOCABULARY) + 1)
    frequencies /= frequencies.sum()
    picked = rng.choice(len(VOCABULARY), (count, 14), p=frequencies)
    texts = [" ".join(VOCABULARY[word] for word in row) for row in picked.tolist()]

    def work() -> None:
        pool = Pool([("seed", "name three rivers")])
        for number, text in enumerate(texts):
            pool.nearest(text)
            pool.add(f"new-{number}", text)

    return work


ROWS = {
    "annotate": Row("annotate, 2,000 tokens", "prompts", (500, 2000, 8000), annotation),
    "ahead": Row("state of staleness: 1, 8,192 tokens", "responses", (128, 512), drawn_ahead),
    "instructions": Row("nearest of new instructions", "instructions", (10_000, 30_000, 100_000), instructions),
}
