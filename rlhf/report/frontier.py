"""Points of the trade between gold and the distance from the reference: checkpoints and finished policies."""

from __future__ import annotations

from rlhf.recipe.seeds import method
from rlhf.report.intervals import Array, Groups, standard_error
from rlhf.report.results import Comparison, FrontierPoint
from rlhf.report.samples import Samples


def frontier_point(run: str, samples: Samples, step: int | None = None) -> FrontierPoint:
    """Return where one policy stands: means over the prompts of `samples`, with standard errors.

    `run` is the stage that trained it (`ppo@2`); `step` the checkpoint's, None for the finished policy.
    """
    groups = Groups(samples.prompt_ids)
    gold, gold_se = _mean(samples.gold, groups)
    kl, kl_se = _mean(samples.kl, groups)
    length, _ = _mean(samples.tokens, groups)
    reward, reward_se = (None, None) if samples.reward is None else _mean(samples.reward, groups)
    return FrontierPoint(method(run), run, step, gold, gold_se, reward, reward_se, kl, kl_se, length)


def paths(comparison: Comparison) -> dict[str, list[FrontierPoint]]:
    """Return the points of each run in the order of training, the finished policy last."""
    found: dict[str, list[FrontierPoint]] = {}
    for point in comparison.frontier:
        found.setdefault(point.run, []).append(point)
    return {run: sorted(points, key=_when) for run, points in found.items()}


def _when(point: FrontierPoint) -> float:
    return float("inf") if point.step is None else point.step


def _mean(values: Array, groups: Groups) -> tuple[float, float | None]:
    means = groups.means(values)[None, None]
    return float(means.mean()), standard_error(means) if means.size > 1 else None
