"""The report as one HTML file that needs no network and trusts no text of the model."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import jinja2
from plotly.offline import get_plotlyjs

from rlhf.report.curves import Curve
from rlhf.report.figures import Plot, colour, curve_plots, frontier_plots
from rlhf.report.frontier import diagnose
from rlhf.report.results import FEWEST_PROMPTS, METRICS, CandidateSamples, Comparison, PairedDifference, Sample, show
from rlhf.report.table import percent, verdict
from rlhf.report.untrusted import visible

SHOWN_PROMPTS = 12


@dataclass(frozen=True)
class StagePlots:
    """The learning curves of one stage, the telling ones first and the rest folded away."""

    name: str
    tint: str
    leading: Sequence[Plot]
    rest: Sequence[Plot]


@dataclass(frozen=True)
class PairRow:
    """All differences of one pair of candidates, and the gold one as a bar: left and width in per cent of the scale."""

    candidate: str
    baseline: str
    cells: Sequence[PairedDifference]
    low: float
    high: float
    middle: float
    zero: float


@dataclass(frozen=True)
class SampleRow:
    """One prompt with the first response of each candidate."""

    prompt: str
    samples: Sequence[Sample]
    best: float


def write_html(
    path: Path,
    comparison: Comparison,
    curves: Mapping[str, Curve],
    samples: Sequence[CandidateSamples],
    facts: Mapping[str, str],
) -> None:
    """Write the whole report to `path`; `facts` (name -> value) are listed under how it was measured."""
    scripts = [get_plotlyjs(), files("rlhf.report").joinpath("report.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(show=show, signed=partial(show, sign=True), visible=visible)
    template = environment.from_string(files("rlhf.report").joinpath("template.html.jinja").read_text(encoding="utf-8"))
    page = template.render(
        policy=_content_policy(scripts),
        scripts=scripts,
        comparison=comparison,
        ranked=sorted(comparison.candidates, key=lambda item: -item.gold),
        verdict=verdict(comparison),
        findings=[_parts(finding) for finding in diagnose(comparison, curves)],
        pairs=_pairs(comparison),
        frontier=frontier_plots(comparison, curves),
        stages=[_stage(comparison, name, curve) for name, curve in curves.items()],
        rows=_sample_rows(samples),
        names=[item.name for item in samples],
        facts=facts,
        tints={item.name: colour(comparison, item.name) for item in comparison.candidates},
        percent=percent,
        fewest=FEWEST_PROMPTS,
    )
    path.write_text(page, encoding="utf-8")


def _content_policy(scripts: Sequence[str]) -> str:
    """Allow exactly our own scripts, by hash, and no request to anywhere."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _parts(finding: str) -> tuple[str, str, str]:
    """Split a finding into its subject, what is claimed of it (maybe nothing) and the advice."""
    what, _, advice = finding.partition(" Try: ")
    subject, _, claim = what.partition(": ")
    return subject, claim, advice


def _stage(comparison: Comparison, name: str, curve: Curve) -> StagePlots:
    tint = colour(comparison, name)
    plots = curve_plots(curve, tint)
    return StagePlots(name, tint, plots[:8], plots[8:])


def _pairs(comparison: Comparison) -> list[PairRow]:
    golds = [item for item in comparison.differences if item.metric == "gold"]
    ends = [0.0, *(item.difference for item in golds)]
    bounded = [item for item in golds if abs(item.ci.low) < float("inf")]
    ends += [end for item in bounded for end in (item.ci.low, item.ci.high)]
    start, span = min(ends), (max(ends) - min(ends)) or 1.0

    def place(value: float) -> float:
        return round(4 + 92 * min(max((value - start) / span, 0.0), 1.0), 2)

    return [
        PairRow(
            candidate=item.candidate,
            baseline=item.baseline,
            cells=[comparison.difference(item.candidate, item.baseline, metric) for metric in METRICS],
            low=place(item.ci.low),
            high=place(item.ci.high),
            middle=place(item.difference),
            zero=place(0.0),
        )
        for item in golds
    ]


def _sample_rows(candidates: Sequence[CandidateSamples]) -> list[SampleRow]:
    """Take prompts evenly spaced over the held-out order, so that nobody picked them by result."""
    ids = [sample.prompt_id for sample in candidates[0].samples]
    first = [place for place, name in enumerate(ids) if name not in ids[:place]]
    count = min(SHOWN_PROMPTS, len(first))
    rows = []
    for turn in range(count):
        found = [item.samples[first[turn * len(first) // count]] for item in candidates]
        rows.append(SampleRow(found[0].prompt, found, max(sample.gold for sample in found)))
    return rows
