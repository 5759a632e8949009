"""What a compare stage measured, kept so that finished runs can be compared with each other without sampling again.

`evaluation.json` says what was compared and how; the responses and their scores stand in a file for each candidate,
one a line, and so do its scores of retention chats.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from pydantic import TypeAdapter

from rlhf.disk import failures_told
from rlhf.errors import DataError
from rlhf.recipe.base import Budget
from rlhf.report.results import Comparison, Cost, FrontierPoint
from rlhf.report.sample_file import read_chat_scores, read_samples, write_chat_scores
from rlhf.report.samples import CandidateSamples, ChatScores, Sample, Samples
from rlhf.report.statistics import compare
from rlhf.stage_places import stage_folders

FILE = "evaluation.json"
SAMPLES, RETENTION = "step-00000.jsonl", "retention.jsonl"


@dataclass(frozen=True, kw_only=True)
class Circumstances:
    """How candidates were compared.

    `conditions` are what two evaluations must share to be compared (prompts, decoding, gold), in words or as digests;
    `baseline_key`, `reward_key` and `retention_key` tell whether baselines, proxy rewards and retention chats are the
    same; `facts` are for the report.
    """

    baseline: str
    baseline_key: str
    reward_key: str
    conditions: Mapping[str, str]
    frontier: tuple[FrontierPoint, ...]
    budget: Budget | None
    reward_accuracy: float | None
    facts: Mapping[str, str]
    seed: int
    bootstrap_samples: int
    retention_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Circumstances):
    """All samples and scores of one comparison."""

    candidates: tuple[CandidateSamples, ...]

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


@dataclass(frozen=True)
class OldScore:
    """A retention chat as earlier versions wrote it."""

    nats: float
    tokens: int


@dataclass(frozen=True)
class Listed:
    """A candidate as `evaluation.json` has it; earlier versions wrote its samples and chats there too."""

    name: str
    kind: str
    cost: Cost | None = None
    preference_accuracy: float | None = None
    samples: tuple[Sample, ...] | None = None
    retention: tuple[OldScore, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Listing(Circumstances):
    """What `evaluation.json` holds."""

    candidates: tuple[Listed, ...]


def sample_file(folder: Path, candidate: str) -> Path:
    """Return the file of a candidate's responses in a compare stage's folder."""
    return folder / "samples" / candidate / SAMPLES


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write an evaluation into a compare stage's folder; its responses are in their `sample_file` already."""
    for item in evaluation.candidates:
        if len(item.retention):
            write_chat_scores(sample_file(folder, item.name).with_name(RETENTION), item.retention)
    known = {field.name: getattr(evaluation, field.name) for field in fields(Circumstances)}
    listed = (Listed(item.name, item.kind, item.cost, item.preference_accuracy) for item in evaluation.candidates)
    content = TypeAdapter(Listing).dump_json(Listing(**known, candidates=tuple(listed)))
    partial = folder / f"{FILE}.partial"
    with failures_told(partial, "cannot be written"), partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / FILE)


def read_evaluation(run: Path) -> Evaluation:
    """Read the last comparison of a finished run; DataError when the folder has none or it is damaged."""
    path, content = _newest(run)
    try:
        listing = TypeAdapter(Listing).validate_json(content)
    except ValueError as error:
        raise DataError(f"{path}:1: not an evaluation ({str(error).splitlines()[0]})") from error
    known = {field.name: getattr(listing, field.name) for field in fields(Circumstances)}
    return Evaluation(**known, candidates=tuple(_candidate(item, path.parent) for item in listing.candidates))


def _newest(run: Path) -> tuple[Path, bytes]:
    """Return the newest evaluation of candidates; a classify stage writes a file of the same name about its classes."""
    found = [folder / FILE for folder in stage_folders(run) if (folder / FILE).is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        content = path.read_bytes()
        if b'"baseline"' in content:
            return path, content
    raise DataError(f"{run}: no finished comparison in this run folder (stages/*/{FILE}); give its recipe one")


def _candidate(item: Listed, folder: Path) -> CandidateSamples:
    if item.samples is not None:
        retention = ChatScores.of((chat.nats for chat in item.retention), (chat.tokens for chat in item.retention))
        samples = Samples.of(item.samples)
    else:
        if Path(item.name).name != item.name:
            raise DataError(f"{folder / FILE}:1: {item.name!r} is no name of a candidate")
        file = sample_file(folder, item.name)
        chats = file.with_name(RETENTION)
        samples, retention = read_samples(file), read_chat_scores(chats) if chats.exists() else ChatScores.of()
    return CandidateSamples(item.name, item.kind, samples, item.cost, item.preference_accuracy, retention)


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
        candidates = [replace(item, retention=ChatScores.of()) for item in candidates]
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
    return replace(item, samples=item.samples.without_reward())


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
