"""The report as one HTML file that needs no network and trusts no text of the model."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from rlhf.privacy import public
from rlhf.recipe.seeds import method
from rlhf.report.curves import Curve
from rlhf.report.figures import Plot, colour, frontier_plots, histogram_plots
from rlhf.report.findings import diagnose
from rlhf.report.learning import curve_plots
from rlhf.report.recipes import RecipeDifference, recipe_differences
from rlhf.report.results import FEWEST_PROMPTS, Comparison, PairedDifference, show
from rlhf.report.samples import CandidateSamples, Sample
from rlhf.report.table import chance, percent, seeds, verdict
from rlhf.untrusted import visible

MOST_PROMPTS = 200
LEADING_PLOTS = 8


@dataclass(frozen=True)
class StagePlots:
    """The learning curves of one stage, the telling ones first and the rest folded away."""

    name: str
    runs: int
    tint: str
    leading: Sequence[Plot]
    rest: Sequence[Plot]


@dataclass(frozen=True)
class PairRow:
    """All differences of one pair of methods, and the gold one as a bar: left and width in per cent of the scale."""

    candidate: str
    baseline: str
    cells: Sequence[PairedDifference]
    low: float
    high: float
    middle: float
    zero: float


@dataclass(frozen=True)
class SampleCard:
    """One prompt with one response of each method (of its first run)."""

    prompt: str
    answers: Mapping[str, Sample]
    best: float


def write_html(
    path: Path,
    comparison: Comparison,
    curves: Mapping[str, Curve],
    samples: Sequence[CandidateSamples],
    facts: Mapping[str, str],
    *,
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    recipe_folders: Mapping[str, Path | None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Write the whole report to `path`.

    `facts` (name -> value) are listed under how it was measured, `environment` (package -> version) after them;
    `recipes` (run -> resolved recipe) of two or more runs adds what they do differently; `recipe_folders` are those of
    the recipes' files, as `recipe_differences` takes them.
    """
    recipes, recipe_folders = recipes or {}, recipe_folders or {}
    differences = recipe_differences(list(recipes.values()), [recipe_folders.get(name) for name in recipes])
    scripts = [get_plotlyjs(), files("rlhf.report").joinpath("report.js").read_text(encoding="utf-8")]
    loader = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    loader.filters.update(show=show, signed=partial(show, sign=True), visible=visible, chance=chance)
    template = loader.from_string(files("rlhf.report").joinpath("template.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        policy=_content_policy(scripts),
        scripts=scripts,
        comparison=comparison,
        seeds=seeds(comparison),
        verdict=verdict(comparison),
        findings=diagnose(comparison, curves),
        pairs=_pairs(comparison),
        frontier=frontier_plots(comparison, curves),
        histograms=histogram_plots(comparison, samples),
        stages=_stages(comparison, curves),
        cards=_cards(samples),
        names=[item.name for item in comparison.candidates],
        differences=[_public(one) for one in differences],
        runs=public(list(recipes)),
        facts=public(facts),
        environment=public(environment or {}),
        tints={item.name: colour(comparison, item.name) for item in comparison.candidates},
        percent=percent,
        fewest=FEWEST_PROMPTS,
    )
    path.write_text(page, encoding="utf-8")


def _public(difference: RecipeDifference) -> RecipeDifference:
    """Return a difference that says nothing of the machine; two paths of one name still differ by a number."""
    shown: list[str] = public(list(difference.values))
    kinds = list(dict.fromkeys(difference.values))
    if len(set(shown)) < len(kinds):
        shown = [f"{text} ({kinds.index(value) + 1})" for text, value in zip(shown, difference.values, strict=True)]
    return RecipeDifference(difference.key, tuple(shown))


def _content_policy(scripts: Sequence[str]) -> str:
    """Allow exactly our own scripts, by hash, and no request to anywhere."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _stages(comparison: Comparison, curves: Mapping[str, Curve]) -> list[StagePlots]:
    """Return the learning curves by stage, the runs of one stage in one plot."""
    runs: dict[str, list[Curve]] = {}
    for name, curve in curves.items():
        runs.setdefault(method(name), []).append(curve)
    stages = []
    for name, found in runs.items():
        tint = colour(comparison, name)
        plots = curve_plots(found, tint)
        stages.append(StagePlots(name, len(found), tint, plots[:LEADING_PLOTS], plots[LEADING_PLOTS:]))
    return stages


def _pairs(comparison: Comparison) -> list[PairRow]:
    golds = [item for item in comparison.differences if item.metric == "gold"]
    ends = [0.0, *(item.difference for item in golds)]
    ends += [end for item in golds if item.ci.bounded for end in item.ci]
    start, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * min(max((value - start) / span, 0.0), 1.0), 2)

    return [
        PairRow(
            candidate=item.candidate,
            baseline=item.baseline,
            cells=[comparison.difference(item.candidate, item.baseline, metric) for metric in comparison.metrics],
            low=place(item.ci.low),
            high=place(item.ci.high),
            middle=place(item.difference),
            zero=place(0.0),
        )
        for item in golds
    ]


def _cards(candidates: Sequence[CandidateSamples]) -> list[SampleCard]:
    """Take prompts evenly spaced over the held-out order, so that nobody picked them by result."""
    order: dict[str, int] = {}
    for place, prompt_id in enumerate(candidates[0].samples.prompt_ids):
        order.setdefault(prompt_id, place)
    first = list(order.values())
    count = min(MOST_PROMPTS, len(first))
    runs = {method(item.name): item for item in reversed(candidates)}
    names = dict.fromkeys(method(item.name) for item in candidates)
    cards = []
    for turn in range(count):
        place = first[turn * len(first) // count]
        answers = {name: runs[name].samples[place] for name in names}
        prompt, _ = candidates[0].samples.texts(place)
        cards.append(SampleCard(prompt, answers, max(sample.gold for sample in answers.values())))
    return cards
