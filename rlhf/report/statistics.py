"""The comparison itself: every method, every pair of methods, on the same prompts.

Candidates answer the same prompts, so differences are taken prompt by prompt (paired), which removes the spread
between easy and hard prompts. Runs of one method under several seeds (`ppo@1`, `ppo@2`) make one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

import numpy as np

from rlhf.errors import TrainingError
from rlhf.recipe.base import Budget
from rlhf.recipe.seeds import method
from rlhf.report.frontier import frontier_point
from rlhf.report.intervals import Array, Groups, estimates, holm
from rlhf.report.results import (
    METRICS,
    CandidateResult,
    Comparison,
    Cost,
    Estimate,
    FrontierPoint,
    Metric,
    PairedDifference,
    Retention,
    RunResult,
    WinRate,
)
from rlhf.report.samples import CandidateSamples
from rlhf.report.wins import Meeting, bounded, outcomes, tally


@dataclass(frozen=True)
class Method:
    """The runs of one method: `gold` and `characters` `[runs, samples]`, `means` `[runs, prompts]` of each metric."""

    name: str
    runs: tuple[CandidateSamples, ...]
    gold: Array
    characters: Array
    means: Mapping[Metric, Array]


class Question(NamedTuple):
    """One number of which the interval is wanted: a method's mean, or what one has more than the `other`."""

    method: str
    metric: Metric
    other: str = ""


@dataclass(frozen=True)
class Settings:
    """How intervals are made."""

    seed: int
    resamples: int
    level: float


def compare(
    candidates: Sequence[CandidateSamples],
    baseline: str,
    seed: int,
    resamples: int,
    level: float = 0.95,
    tie_margin: float = 1e-6,
    *,
    frontier: Sequence[FrontierPoint] = (),
    budget: Budget | None = None,
    reward_accuracy: float | None = None,
) -> Comparison:
    """Measure every method and every pair of them; `baseline` names the one that win rates are against.

    `frontier` has the points of checkpoints; those of the candidates themselves are added. `budget` and
    `reward_accuracy` are passed on to the report. Time and memory grow with the number of samples; all means share
    their resamples.
    Raises TrainingError when candidates were not sampled on the same prompts or a score is not finite.
    """
    groups = Groups(_checked(candidates, baseline))
    methods, settings = _methods(candidates, groups), Settings(seed, resamples, level)
    baseline = method(baseline)
    pairs = _pairs(list(methods), baseline)
    answers, wins = _answers(methods, pairs, baseline, groups, settings, tie_margin)
    retained = _retention(methods, baseline, settings)
    return Comparison(
        baseline=baseline,
        candidates=tuple(
            _result(item, answers, wins[item.name, baseline], retained.get(item.name)) for item in methods.values()
        ),
        differences=_differences(answers, pairs, settings.level),
        wins=tuple(wins[pair] for pair in pairs),
        frontier=(*frontier, *(frontier_point(item.name, item.samples) for item in candidates)),
        budget=budget,
        reward_accuracy=reward_accuracy,
        prompts=len(groups.counts),
        samples=len(groups.member),
        seed=seed,
        bootstrap_samples=resamples,
        level=level,
        tie_margin=tie_margin,
    )


def _methods(candidates: Sequence[CandidateSamples], groups: Groups) -> dict[str, Method]:
    runs: dict[str, list[CandidateSamples]] = {}
    for item in candidates:
        runs.setdefault(method(item.name), []).append(item)
    methods = {}
    for name, items in runs.items():
        means = {
            metric: np.stack([groups.means(_column(item, metric)) for item in items]) for metric in _measured(items[0])
        }
        gold = np.stack([item.samples.gold for item in items])
        characters = np.stack([item.samples.characters for item in items])
        methods[name] = Method(name, tuple(items), gold, characters, means)
    return methods


def _answers(
    methods: Mapping[str, Method],
    pairs: Sequence[tuple[str, str]],
    baseline: str,
    groups: Groups,
    settings: Settings,
    tie_margin: float,
) -> tuple[Mapping[Question, Estimate], Mapping[tuple[str, str], WinRate]]:
    """Return what every question comes to, and every pair's win rate and the baseline's own; all share resamples."""
    questions, met, rates = _asked(methods, pairs), [*pairs, (baseline, baseline)], []

    def values() -> Iterator[Array]:
        yield from (_values(methods, question) for question in questions)
        for one, other in met:
            rate, wins = tally(_meeting(methods[one], methods[other], tie_margin), groups)
            rates.append(rate)
            yield wins

    found = estimates(values(), settings.seed, settings.resamples, settings.level)
    wins = [bounded(rate, one, settings.level) for rate, one in zip(rates, found[len(questions) :], strict=True)]
    return dict(zip(questions, found, strict=False)), dict(zip(met, wins, strict=True))


def _asked(methods: Mapping[str, Method], pairs: Sequence[tuple[str, str]]) -> list[Question]:
    """Return every method's mean and every pair's difference in each metric."""
    metrics = list(next(iter(methods.values())).means)
    asked = [Question(name, metric) for name in methods for metric in metrics]
    return asked + [Question(one, metric, other) for metric in metrics for one, other in pairs]


def _values(methods: Mapping[str, Method], question: Question) -> Array:
    mine = methods[question.method].means[question.metric][:, None]
    return mine - methods[question.other].means[question.metric][None] if question.other else mine


def _result(
    item: Method, answers: Mapping[Question, Estimate], won: WinRate, retained: Retention | None
) -> CandidateResult:
    found = {metric: answers[Question(item.name, metric)] for metric in item.means}
    reward = found.get("reward")
    samples = [run.samples for run in item.runs]
    return CandidateResult(
        name=item.name,
        kind=item.runs[0].kind,
        runs=tuple(_run(item, place) for place in range(len(item.runs))),
        gold=found["gold"].value,
        gold_ci=found["gold"].ci,
        reward=reward.value if reward else None,
        reward_ci=reward.ci if reward else None,
        kl=found["kl"].value,
        kl_ci=found["kl"].ci,
        length=found["length"].value,
        length_ci=found["length"].ci,
        win_rate=won.win_rate,
        win_rate_ci=won.win_rate_ci,
        truncated=fmean(float(run.cut.mean()) for run in samples),
        distinct=fmean(run.distinct / len(run) for run in samples),
        entropy=fmean(float(run.entropy.mean()) for run in samples),
        characters=float(item.characters.mean()),
        preference_accuracy=_mean([run.preference_accuracy for run in item.runs]),
        cost=_mean_cost([run.cost for run in item.runs if run.cost]),
        retention=retained,
    )


def _retention(methods: Mapping[str, Method], baseline: str, settings: Settings) -> dict[str, Retention]:
    """Return how every method predicts the retention chats, and what that is against the baseline; {} without them."""
    chats = methods[baseline].runs[0].retention
    if not len(chats):
        return {}
    tokens = chats.tokens
    values = {name: _per_token(item.runs, tokens) for name, item in methods.items()}
    others = [name for name in methods if name != baseline]
    asked = [column[:, None] for column in values.values()]
    asked += [values[name][:, None] - values[baseline][None] for name in others]
    answers = estimates(asked, settings.seed, settings.resamples, settings.level)
    gaps = dict(zip(others, answers[len(values) :], strict=True))
    corrected = dict(zip(others, holm([gap.p_value for gap in gaps.values()]), strict=True))
    found = {}
    for name, own in zip(values, answers, strict=False):
        gap, against = gaps.get(name), None
        if gap:
            tests = (gap.value, gap.ci, gap.n, gap.p_value, corrected[name], settings.level)
            against = PairedDifference(name, baseline, "retention", *tests)
        found[name] = Retention(own.value, own.ci, against, len(chats), int(tokens.sum()))
    return found


def _per_token(runs: Sequence[CandidateSamples], tokens: Array) -> Array:
    """Return values `[runs, chats]` whose mean is the nats a token, and whose spread is the ratio's over chats.

    The ratio of two sums is linear in each chat to first order (the delta method): R + (nats - R * tokens) / mean
    tokens.
    """
    nats = np.stack([run.retention.nats for run in runs])
    ratios = nats.sum(axis=1, keepdims=True) / tokens.sum()
    values: Array = ratios + (nats - ratios * tokens) / tokens.mean()
    return values


def _run(item: Method, place: int) -> RunResult:
    means = {metric: float(column[place].mean()) for metric, column in item.means.items()}
    return RunResult(item.runs[place].name, means["gold"], means.get("reward"), means["kl"], means["length"])


def _differences(
    answers: Mapping[Question, Estimate], pairs: Sequence[tuple[str, str]], level: float
) -> tuple[PairedDifference, ...]:
    differences: list[PairedDifference] = []
    for metric in dict.fromkeys(question.metric for question in answers):
        gaps = [answers[Question(one, metric, other)] for one, other in pairs]
        corrected = holm([gap.p_value for gap in gaps])
        differences += [
            PairedDifference(*pair, metric, gap.value, gap.ci, gap.n, gap.p_value, p_corrected, level)
            for pair, gap, p_corrected in zip(pairs, gaps, corrected, strict=True)
        ]
    return tuple(differences)


def _meeting(one: Method, other: Method, tie_margin: float) -> Meeting:
    outcome = outcomes(one.gold, other.gold, tie_margin)
    if one is other:  # a run against itself is a tie, and against another run of its method half of the time
        outcome = np.full((1, 1, outcome.shape[-1]), 0.5)
    longer = one.characters[:, None] - other.characters[None]
    return Meeting(one.name, other.name, outcome, longer[: outcome.shape[0], : outcome.shape[1]])


def _measured(item: CandidateSamples) -> list[Metric]:
    return [metric for metric in METRICS if metric != "reward" or item.samples.reward is not None]


def _column(item: CandidateSamples, metric: Metric) -> Array:
    column: Array = getattr(item.samples, "tokens" if metric == "length" else metric)
    return column


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _mean_cost(costs: Sequence[Cost]) -> Cost | None:
    names = ("gradient_tokens", "generated_tokens", "seconds", "accelerator_seconds")
    return Cost(*(fmean(getattr(cost, name) for cost in costs) for name in names)) if costs else None


def _pairs(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    others = [name for name in names if name != baseline]
    return [(name, baseline) for name in others] + [(late, early) for early, late in combinations(others, 2)]


def _checked(candidates: Sequence[CandidateSamples], baseline: str) -> tuple[str, ...]:
    names = [item.name for item in candidates]
    known = {method(name) for name in names}
    if method(baseline) not in known or len(set(names)) != len(names):
        raise TrainingError(f"compare: need candidates of different names with {baseline!r} among them, got {names}")
    prompt_ids = candidates[0].samples.prompt_ids
    if not prompt_ids:
        raise TrainingError("compare: there are no samples to compare; check the stage's prompts")
    if len({item.samples.reward is None for item in candidates}) > 1:
        raise TrainingError("compare: some samples have a proxy reward and some have none; score all or none")
    for item in candidates:
        _check_retention(item, candidates[0])
        if item.samples.prompt_ids != prompt_ids:
            raise TrainingError(
                f"compare: {item.name} was not sampled on the same prompts, in the same order, as {names[0]}"
            )
        for metric in _measured(item):
            column = _column(item, metric)
            bad = np.flatnonzero(~np.isfinite(column))
            if bad.size:
                raise TrainingError(
                    f"compare: {item.name} has {metric} = {column[bad[0]]} for prompt {prompt_ids[bad[0]]!r} "
                    f"({bad.size} of {len(column)} samples); fix the judge so that every score is finite"
                )
    return prompt_ids


def _check_retention(item: CandidateSamples, first: CandidateSamples) -> None:
    if not np.array_equal(item.retention.tokens, first.retention.tokens):
        raise TrainingError(f"compare: {item.name} was not asked for the same retention chats as {first.name}")
    bad = np.flatnonzero(~np.isfinite(item.retention.nats))
    if bad.size:
        raise TrainingError(f"compare: {item.name} gives retention chat {bad[0] + 1} a probability of 0 or none at all")
