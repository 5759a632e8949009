"""Rows of `tests.benchmarks.scale` about comparisons: eight candidates, four responses to each prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from rlhf.data.lazy import Lazy
from rlhf.report.evaluation import Evaluation, sample_file, write_evaluation
from rlhf.report.runs import compare_runs
from rlhf.report.sample_file import write_samples
from rlhf.report.samples import CandidateSamples, Sample
from rlhf.report.table import comparison_table
from rlhf.stages.drawn import Drawn
from rlhf.stages.parts import Parts
from rlhf.types import Prompt, Rollout
from tests.benchmarks._rows import Row, Work

CANDIDATES, EACH, RESAMPLES = 8, 4, 10_000
TEXT = "a response of about two hundred characters, which is what fifty tokens make " * 3
TOKENS, IN_PART = 200, 1000


def responses(name: str, count: int, each: int = EACH) -> Iterator[Sample]:
    """Yield scored responses of a candidate; difficulty is shared by all."""
    rng, shared = np.random.default_rng([*name.encode()]), np.random.default_rng(0)
    for row in range(count):
        if row % each == 0:
            difficulty = shared.normal()
        gold, proxy = difficulty + rng.normal(size=2)
        kl, length = rng.gamma(2, 2), int(rng.integers(20, 80))
        prompt = row // each
        yield Sample(f"p{prompt}", f"question {prompt}", f"{TEXT}{row}", gold, proxy, kl, length, "stop", 1.0)


def written(count: int, run: Path, each: int = EACH) -> Evaluation:
    """Write the evaluation of a run."""
    folder, names = run / "stages" / "duel", [f"m{number}" for number in range(CANDIDATES)]
    candidates = tuple(
        CandidateSamples(name, "ppo", write_samples(sample_file(folder, name), responses(name, count, each)))
        for name in names
    )
    evaluation = Evaluation(
        baseline="m0", baseline_key="", reward_key="", conditions={}, candidates=candidates, frontier=(), budget=None,
        reward_accuracy=None, facts={}, seed=5, bootstrap_samples=RESAMPLES,
    )  # fmt: skip
    write_evaluation(folder, evaluation)
    environment = {"python": "3", "platform": "", "packages": {}}
    (run / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return evaluation


def statistics(count: int, folder: Path) -> Work:
    """Means, intervals, tests and win rates of all pairs, 10,000 resamples."""
    evaluation = written(count, folder)
    return lambda: Console(quiet=True).print(comparison_table(evaluation.compare()))


def statistics_of_single(count: int, folder: Path) -> Work:
    """The same with one response to each prompt, so four times the prompts."""
    evaluation = written(count, folder, each=1)
    return evaluation.compare


def finished(count: int, folder: Path) -> Work:
    """`rlhf compare RUN`: reads the rows, compares, and writes both reports."""
    written(count, folder)
    return lambda: compare_runs([folder], folder / "again.html")


def kept(count: int, folder: Path) -> Work:
    """One candidate's responses into parts on disk, back from there, and into the file that people read."""
    prompts = Lazy(lambda i: Prompt(f"p{i}", tuple(range(50)), f"question {i}"), count // EACH)
    item = Drawn("ppo", prompts, False, EACH, Parts(folder / "parts", print))
    rng = np.random.default_rng(0)

    def drawn(start: int) -> list[Rollout]:
        ids = rng.integers(0, 32_000, (IN_PART, TOKENS)).tolist()
        places = range(start * EACH, min(start * EACH + IN_PART, count))
        return [
            Rollout(prompts[place // EACH], tuple(row), (-1.0,) * TOKENS, f"{TEXT}{place}", "stop", 0, place)
            for row, place in zip(ids, places, strict=False)
        ]

    def work() -> None:
        while item.done < len(prompts):
            rollouts = drawn(item.done)
            zeros = torch.zeros(len(rollouts))
            item.add(rollouts, zeros, zeros, zeros)
        for start in range(0, len(prompts), IN_PART // EACH):
            assert len(item.rollouts(start, min(start + IN_PART // EACH, len(prompts)))) % EACH == 0
        rows = (Sample(**answer._asdict(), gold=0.0, reward=None, kl=0.0, entropy=0.0) for answer in item.answers())
        assert asdict(write_samples(folder / "samples.jsonl", rows)[count - 1])["prompt_id"] == prompts[-1].id

    return work


SIZES = (20_000, 100_000)
ROWS = {
    "compare": Row("statistics, 4 responses a prompt", "responses x 8 candidates", SIZES, statistics),
    "compare_single": Row("statistics, 1 response a prompt", "responses x 8 candidates", SIZES, statistics_of_single),
    "compare_runs": Row("rlhf compare RUN", "responses x 8 candidates", SIZES, finished),
    "compare_parts": Row("parts written and read", "responses of 200 tokens", SIZES, kept),
}
