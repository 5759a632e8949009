"""Points of the trade between gold and the distance from the reference: checkpoints and finished policies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf.recipe.seeds import method
from rlhf.report.intervals import by_prompt, standard_error
from rlhf.report.results import Comparison, FrontierPoint
from rlhf.report.samples import Sample


def frontier_point(run: str, samples: Sequence[Sample], step: int | None = None) -> FrontierPoint:
    """Return where one policy stands: means over the prompts of `samples`, with standard errors.

    `run` is the stage that trained it (`ppo@2`); `step` the checkpoint's, None for the finished policy.
    """
    prompt_ids = [sample.prompt_id for sample in samples]
    gold, gold_se = _mean([sample.gold for sample in samples], prompt_ids)
    kl, kl_se = _mean([sample.kl for sample in samples], prompt_ids)
    length, _ = _mean([sample.tokens for sample in samples], prompt_ids)
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    reward, reward_se = _mean(rewards, prompt_ids) if rewards else (None, None)
    return FrontierPoint(method(run), run, step, gold, gold_se, reward, reward_se, kl, kl_se, length)


def paths(comparison: Comparison) -> dict[str, list[FrontierPoint]]:
    """Return the points of each run in the order of training, the finished policy last."""
    found: dict[str, list[FrontierPoint]] = {}
    for point in comparison.frontier:
        found.setdefault(point.run, []).append(point)
    return {run: sorted(points, key=_when) for run, points in found.items()}


def _when(point: FrontierPoint) -> float:
    return float("inf") if point.step is None else point.step


def _mean(values: Sequence[float], prompt_ids: Sequence[str]) -> tuple[float, float | None]:
    means = by_prompt(np.array([[values]]), prompt_ids)
    return float(means.mean()), standard_error(means) if means.size > 1 else None
