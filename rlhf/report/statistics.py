"""The comparison itself: every method, every pair of methods, on the same prompts.

Candidates answer the same prompts, so differences are taken prompt by prompt (paired), which removes the spread
between easy and hard prompts. Runs of one method under several seeds (`ppo@1`, `ppo@2`) make one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

import numpy as np

from rlhf.errors import TrainingError
from rlhf.recipe.base import Budget
from rlhf.recipe.seeds import method
from rlhf.report.frontier import frontier_point
from rlhf.report.intervals import Array, by_prompt, estimate, holm
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
from rlhf.report.wins import outcomes, win_rate


@dataclass(frozen=True)
class Method:
    """The runs of one method; each column is `[runs, samples]`."""

    name: str
    runs: tuple[CandidateSamples, ...]
    columns: Mapping[Metric, Array]
    characters: Array


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
    `reward_accuracy` are passed on to the report.
    Raises TrainingError when candidates were not sampled on the same prompts or a score is not finite.
    """
    prompt_ids = _checked(candidates, baseline)
    methods, settings = _methods(candidates), Settings(seed, resamples, level)
    baseline = method(baseline)
    retained = _retention(methods, baseline, settings)
    pairs = _pairs(list(methods), baseline)
    wins = tuple(_win(methods[one], methods[other], prompt_ids, settings, tie_margin) for one, other in pairs)
    against = {item.candidate: item for item in wins if item.baseline == baseline}
    base = methods[baseline]
    against[baseline] = _win(base, base, prompt_ids, settings, tie_margin)
    return Comparison(
        baseline=baseline,
        candidates=tuple(
            _result(item, prompt_ids, against[item.name], retained.get(item.name), settings)
            for item in methods.values()
        ),
        differences=_differences(methods, pairs, prompt_ids, settings),
        wins=wins,
        frontier=(*frontier, *(frontier_point(item.name, item.samples) for item in candidates)),
        budget=budget,
        reward_accuracy=reward_accuracy,
        prompts=len(set(prompt_ids)),
        samples=len(prompt_ids),
        seed=seed,
        bootstrap_samples=resamples,
        level=level,
        tie_margin=tie_margin,
    )


def _methods(candidates: Sequence[CandidateSamples]) -> dict[str, Method]:
    runs: dict[str, list[CandidateSamples]] = {}
    for item in candidates:
        runs.setdefault(method(item.name), []).append(item)
    methods = {}
    for name, items in runs.items():
        columns = {metric: np.stack([_column(item, metric) for item in items]) for metric in _measured(items[0])}
        characters = np.array([[len(sample.response) for sample in item.samples] for item in items], dtype=np.float64)
        methods[name] = Method(name, tuple(items), columns, characters)
    return methods


def _result(
    item: Method, prompt_ids: Sequence[str], won: WinRate, retained: Retention | None, settings: Settings
) -> CandidateResult:
    found = {
        metric: _estimate(by_prompt(column, prompt_ids)[:, None], settings) for metric, column in item.columns.items()
    }
    reward = found.get("reward")
    samples = [sample for run in item.runs for sample in run.samples]
    return CandidateResult(
        name=item.name,
        kind=item.runs[0].kind,
        runs=tuple(_run(item, place, prompt_ids) for place in range(len(item.runs))),
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
        truncated=fmean(sample.finish_reason == "length" for sample in samples),
        distinct=fmean(len({sample.response for sample in run.samples}) / len(run.samples) for run in item.runs),
        entropy=fmean(sample.entropy for sample in samples),
        characters=float(item.characters.mean()),
        preference_accuracy=_mean([run.preference_accuracy for run in item.runs]),
        cost=_mean_cost([run.cost for run in item.runs if run.cost]),
        retention=retained,
    )


def _retention(methods: Mapping[str, Method], baseline: str, settings: Settings) -> dict[str, Retention]:
    """Return how every method predicts the retention chats, and what that is against the baseline; {} without them."""
    chats = methods[baseline].runs[0].retention
    if not chats:
        return {}
    tokens = np.array([chat.tokens for chat in chats], dtype=np.float64)
    values = {name: _per_token(item.runs, tokens) for name, item in methods.items()}
    others = [name for name in methods if name != baseline]
    gaps = {name: _estimate(values[name][:, None] - values[baseline][None], settings) for name in others}
    corrected = dict(zip(others, holm([gap.p_value for gap in gaps.values()]), strict=True))
    found = {}
    for name, column in values.items():
        own, gap, against = _estimate(column[:, None], settings), gaps.get(name), None
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
    nats = np.array([[chat.nats for chat in run.retention] for run in runs], dtype=np.float64)
    ratios = nats.sum(axis=1, keepdims=True) / tokens.sum()
    values: Array = ratios + (nats - ratios * tokens) / tokens.mean()
    return values


def _run(item: Method, place: int, prompt_ids: Sequence[str]) -> RunResult:
    means = {metric: float(by_prompt(column[place], prompt_ids).mean()) for metric, column in item.columns.items()}
    return RunResult(item.runs[place].name, means["gold"], means.get("reward"), means["kl"], means["length"])


def _differences(
    methods: Mapping[str, Method], pairs: Sequence[tuple[str, str]], prompt_ids: Sequence[str], settings: Settings
) -> tuple[PairedDifference, ...]:
    differences: list[PairedDifference] = []
    for metric in _measured(next(iter(methods.values())).runs[0]):
        means = {name: by_prompt(item.columns[metric], prompt_ids) for name, item in methods.items()}
        gaps = [_estimate(means[one][:, None] - means[other][None], settings) for one, other in pairs]
        corrected = holm([gap.p_value for gap in gaps])
        differences += [
            PairedDifference(*pair, metric, gap.value, gap.ci, gap.n, gap.p_value, p_corrected, settings.level)
            for pair, gap, p_corrected in zip(pairs, gaps, corrected, strict=True)
        ]
    return tuple(differences)


def _win(one: Method, other: Method, prompt_ids: Sequence[str], settings: Settings, tie_margin: float) -> WinRate:
    outcome = outcomes(one.columns["gold"], other.columns["gold"], tie_margin)
    if one is other:  # a run against itself is a tie, and against another run of its method half of the time
        outcome = np.full((1, 1, outcome.shape[-1]), 0.5)
    longer = one.characters[:, None] - other.characters[None]
    longer = longer[: outcome.shape[0], : outcome.shape[1]]
    how = (settings.seed, settings.resamples, settings.level)
    return win_rate(one.name, other.name, outcome, longer, prompt_ids, *how)


def _estimate(values: Array, settings: Settings) -> Estimate:
    return estimate(values, settings.seed, settings.resamples, settings.level)


def _measured(item: CandidateSamples) -> list[Metric]:
    return [metric for metric in METRICS if metric != "reward" or item.samples[0].reward is not None]


def _column(item: CandidateSamples, metric: Metric) -> Array:
    field = "tokens" if metric == "length" else metric
    return np.array([getattr(sample, field) for sample in item.samples], dtype=np.float64)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _mean_cost(costs: Sequence[Cost]) -> Cost | None:
    names = ("gradient_tokens", "generated_tokens", "seconds", "accelerator_seconds")
    return Cost(*(fmean(getattr(cost, name) for cost in costs) for name in names)) if costs else None


def _pairs(names: Sequence[str], baseline: str) -> list[tuple[str, str]]:
    others = [name for name in names if name != baseline]
    return [(name, baseline) for name in others] + [(late, early) for early, late in combinations(others, 2)]


def _checked(candidates: Sequence[CandidateSamples], baseline: str) -> list[str]:
    names = [item.name for item in candidates]
    known = {method(name) for name in names}
    if method(baseline) not in known or len(set(names)) != len(names):
        raise TrainingError(f"compare: need candidates of different names with {baseline!r} among them, got {names}")
    prompt_ids = [sample.prompt_id for sample in candidates[0].samples]
    if not prompt_ids:
        raise TrainingError("compare: there are no samples to compare; check the stage's prompts")
    scored = {sample.reward is not None for item in candidates for sample in item.samples}
    if len(scored) > 1:
        raise TrainingError("compare: some samples have a proxy reward and some have none; score all of them or none")
    for item in candidates:
        _check_retention(item, candidates[0])
        if [sample.prompt_id for sample in item.samples] != prompt_ids:
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
    if [chat.tokens for chat in item.retention] != [chat.tokens for chat in first.retention]:
        raise TrainingError(f"compare: {item.name} was not asked for the same retention chats as {first.name}")
    bad = [place for place, chat in enumerate(item.retention, start=1) if not np.isfinite(chat.nats)]
    if bad:
        raise TrainingError(f"compare: {item.name} gives retention chat {bad[0]} a probability of 0 or none at all")
