"""What a compare stage measured, kept so that finished runs can be compared with each other without sampling again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from rlhf.errors import DataError
from rlhf.recipe.base import Budget
from rlhf.report.results import Comparison, FrontierPoint
from rlhf.report.samples import CandidateSamples
from rlhf.report.statistics import compare
from rlhf.stage_places import stage_folders

FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """All samples and scores of one comparison.

    `conditions` are what two evaluations must share to be compared (prompts, decoding, gold), in words or as digests;
    `baseline_key`, `reward_key` and `retention_key` tell whether baselines, proxy rewards and retention chats are the
    same; `facts` are for the report.
    """

    baseline: str
    baseline_key: str
    reward_key: str
    conditions: Mapping[str, str]
    candidates: tuple[CandidateSamples, ...]
    frontier: tuple[FrontierPoint, ...]
    budget: Budget | None
    reward_accuracy: float | None
    facts: Mapping[str, str]
    seed: int
    bootstrap_samples: int
    retention_key: str = ""

    def compare(self) -> Comparison:
        """Return means, intervals and differences."""
        return compare(
            self.candidates,
            self.baseline,
            self.seed,
            self.bootstrap_samples,
            frontier=self.frontier,
            budget=self.budget,
            reward_accuracy=self.reward_accuracy,
        )


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write `evaluation.json` into a compare stage's folder."""
    (folder / FILE).write_bytes(TypeAdapter(Evaluation).dump_json(evaluation))


def read_evaluation(run: Path) -> Evaluation:
    """Read the last comparison of a finished run; DataError when the folder has none."""
    files = [folder / FILE for folder in stage_folders(run)]
    found = sorted((file for file in files if file.is_file()), key=lambda path: path.stat().st_mtime)
    if not found:
        raise DataError(f"{run}: no finished comparison in this run folder (stages/*/{FILE}); give its recipe one")
    try:
        return TypeAdapter(Evaluation).validate_json(found[-1].read_bytes())
    except ValueError as error:
        raise DataError(f"{found[-1]}:1: not an evaluation ({str(error).splitlines()[0]})") from error


def merge(runs: Mapping[str, Evaluation]) -> Evaluation:
    """Return one evaluation of several runs' candidates, `run/candidate`; a baseline that all share stands once.

    Baselines that differ are candidates too, the first run's being the baseline; KL is then to each run's own.
    Proxy rewards are left out where the runs have different reward models, retention where they have other chats.
    Raises DataError unless prompts, decoding and judges are the same.
    """
    names = list(runs)
    first = runs[names[0]]
    for name in names[1:]:
        _check_same(names[0], first, name, runs[name])
    shared = len({item.baseline_key for item in runs.values()}) == 1
    candidates: list[CandidateSamples] = []
    points: list[FrontierPoint] = []
    for name, item in runs.items():
        for candidate in item.candidates:
            if shared and candidate.name == item.baseline and item is not first:
                continue
            candidates.append(replace(candidate, name=_renamed(candidate.name, name, item, shared)))
        points += [
            replace(p, method=f"{name}/{p.method}", run=_renamed(p.run, name, item, shared)) for p in item.frontier
        ]
    if len({item.reward_key for item in runs.values()}) > 1:
        candidates = [_unrewarded(item) for item in candidates]
        points = [replace(point, reward=None, reward_se=None) for point in points]
    if len({item.retention_key for item in runs.values()}) > 1:
        candidates = [replace(item, retention=()) for item in candidates]
    kl = "KL" if shared else f"KL (to each run's own baseline, {len(runs)} different ones)"
    facts = {"Runs": ", ".join(names), **{kl if key == "KL" else key: text for key, text in first.facts.items()}}
    return replace(
        first,
        baseline=_renamed(first.baseline, names[0], first, shared),
        candidates=tuple(candidates),
        frontier=tuple(points),
        reward_accuracy=first.reward_accuracy if len({i.reward_accuracy for i in runs.values()}) == 1 else None,
        budget=first.budget if all(item.budget == first.budget for item in runs.values()) else None,
        facts=facts,
    )


def _unrewarded(item: CandidateSamples) -> CandidateSamples:
    return replace(item, samples=tuple(replace(sample, reward=None) for sample in item.samples))


def _renamed(name: str, run: str, item: Evaluation, shared: bool) -> str:
    return name if shared and name == item.baseline else f"{run}/{name}"


def _check_same(name: str, item: Evaluation, other_name: str, other: Evaluation) -> None:
    for condition, value in item.conditions.items():
        theirs = other.conditions.get(condition)
        if theirs != value:
            raise DataError(
                f"{name} and {other_name} were not compared on an equal footing: {condition} is {value} in one and"
                f" {theirs} in the other; run their compare stages with the same"
            )
