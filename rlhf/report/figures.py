"""The report's plots, as Plotly figures; what they look like in light or dark is the page's part."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import plotly.graph_objects as go

from rlhf.recipe.seeds import method
from rlhf.report.curves import Curve, series
from rlhf.report.frontier import paths
from rlhf.report.results import CandidateResult, Comparison, FrontierPoint, Interval
from rlhf.report.samples import Array, CandidateSamples

# Seen well on white and on dark, and apart from each other with colour-blind eyes (after Tol's bright scheme).
PALETTE = (
    "#4a86c5", "#e0713a", "#2b9d6e", "#a968c0", "#c9992b", "#d1506f", "#3fb1c4", "#8f7251", "#7fa32e", "#e08fbd",
    "#6b6fd6", "#b8533f",
)  # fmt: skip
PLAIN = "#7d8694"

BINS = 24
# A normal 95 % interval reaches this many standard errors.
REACH = 1.96

Height = Literal["gold", "reward"]


@dataclass(frozen=True)
class Plot:
    """One plot: its heading, and the figure as Plotly JSON with no `<` in it."""

    title: str
    json: str


def frontier_plots(comparison: Comparison, curves: Mapping[str, Curve]) -> list[Plot]:
    """Plot gold and, where there is one, the proxy against the KL to the reference (Gao et al. 2023).

    Every checkpoint is a point with its interval, joined in the order of training; the means of methods are labelled.
    A run without checkpoints that logged its `kl` adds the path it took on its training prompts, as a faint line.
    """
    labels: dict[Height, str] = {"gold": "Gold reward", "reward": "Reward model"}
    plots = []
    for metric, label in labels.items():
        if metric in comparison.metrics:
            traces = [*_frontier(comparison, curves, metric)]
            plots.append(
                Plot(f"{label} against KL", plot_json(figure(traces, "KL to the reference, nats per response", label)))
            )
    return plots


def histogram_plots(comparison: Comparison, samples: Sequence[CandidateSamples]) -> list[Plot]:
    """Plot how the lengths and the KL of single responses are spread, a line per method, all its runs together."""
    lengths: dict[str, list[Array]] = {}
    kls: dict[str, list[Array]] = {}
    for item in samples:
        lengths.setdefault(method(item.name), []).append(item.samples.tokens)
        kls.setdefault(method(item.name), []).append(item.samples.kl)
    return [
        Plot("Length of responses", plot_json(_histogram(comparison, lengths, "tokens", whole=True))),
        Plot("KL of responses", plot_json(_histogram(comparison, kls, "log(policy/reference), nats", whole=False))),
    ]


def colour(comparison: Comparison, name: str) -> str:
    """Return the colour of a method (or of the method of a run), the same all over the page; grey for other stages."""
    names = [item.name for item in comparison.candidates]
    return PALETTE[names.index(method(name)) % len(PALETTE)] if method(name) in names else PLAIN


def _frontier(comparison: Comparison, curves: Mapping[str, Curve], metric: Height) -> Iterator[go.Scatter]:
    measured = paths(comparison)
    for run, curve in curves.items():
        if len(measured.get(run, ())) < 2 and (path := _training(run, curve, metric, colour(comparison, run))):
            yield path
    for run, points in measured.items():
        if len(points) > 1 or run != method(run):
            yield _checkpoints(run, points, metric, colour(comparison, run))
    for item in comparison.candidates:
        yield _point(item, metric, colour(comparison, item.name))


def _point(item: CandidateResult, metric: Height, tint: str) -> go.Scatter:
    value, interval = getattr(item, metric), getattr(item, f"{metric}_ci")
    return go.Scatter(
        x=[item.kl],
        y=[value],
        error_x=_error(item.kl, item.kl_ci),
        error_y=_error(value, interval),
        mode="markers+text",
        name=item.name,
        text=[item.name],
        textposition="top right",
        marker={"color": tint, "size": 11},
        hovertemplate=f"{item.name}<br>KL %{{x:.3g}}<br>{metric} %{{y:.3g}}<extra></extra>",
        cliponaxis=False,
    )


def _checkpoints(run: str, points: Sequence[FrontierPoint], metric: Height, tint: str) -> go.Scatter:
    known = [point for point in points if getattr(point, metric) is not None]
    labels = ["finished" if point.step is None else f"step {point.step}" for point in known]
    return go.Scatter(
        x=[point.kl for point in known],
        y=[getattr(point, metric) for point in known],
        error_x=_reach([point.kl_se for point in known]),
        error_y=_reach([getattr(point, f"{metric}_se") for point in known]),
        customdata=labels,
        mode="lines+markers",
        name=f"{run} checkpoints",
        opacity=0.6,
        line={"color": tint, "width": 1.5},
        marker={"color": tint, "size": 6},
        hovertemplate=f"{run}, %{{customdata}}<br>KL %{{x:.3g}}<br>{metric} %{{y:.3g}}<extra></extra>",
    )


def _training(run: str, curve: Curve, metric: str, tint: str) -> go.Scatter | None:
    kl, heights = dict(series(curve, "kl")), dict(series(curve, metric))
    steps = [step for step in kl if step in heights]
    if not steps:
        return None
    return go.Scatter(
        x=[kl[step] for step in steps],
        y=[heights[step] for step in steps],
        customdata=steps,
        mode="lines+markers",
        name=f"{run} while training",
        opacity=0.45,
        line={"color": tint, "width": 1.5},
        marker={"color": tint, "size": 4},
        hovertemplate=f"{run}, step %{{customdata:d}}<br>KL %{{x:.3g}}<br>{metric} %{{y:.3g}}<extra></extra>",
    )


def _histogram(comparison: Comparison, runs: Mapping[str, Sequence[Array]], unit: str, whole: bool) -> go.Figure:
    """Draw the share of responses in each of about `BINS` bins; bins of whole numbers hold equally many of them."""
    values = {name: np.concatenate(columns) for name, columns in runs.items()}
    everything = np.concatenate(list(values.values()))
    if whole:
        size = math.ceil((np.ptp(everything) + 1) / BINS)
        edges = np.arange(everything.min(), everything.max() + size + 1, size) - 0.5
    else:
        edges = np.histogram_bin_edges(everything, bins=BINS)
    traces = []
    for name, column in values.items():
        share = np.histogram(column, bins=edges)[0] / len(column)
        traces.append(
            go.Scatter(
                x=[*edges.tolist(), float(edges[-1])],
                y=[*share.tolist(), float(share[-1]), 0.0],
                mode="lines",
                name=name,
                line={"color": colour(comparison, name), "width": 2, "shape": "hv"},
                hovertemplate=f"{name}<br>from %{{x:.3g}}: %{{y:.1%}}<extra></extra>",
            )
        )
    return figure(traces, unit, "share")


def figure(traces: Sequence[go.Scatter], x_title: str, y_title: str) -> go.Figure:
    """Return a plot of the traces as all plots of the report look."""
    axis = {"zeroline": False, "automargin": True, "ticks": ""}
    layout = {
        "template": "none",
        "showlegend": False,
        "margin": {"l": 44, "r": 16, "t": 12, "b": 34},
        "xaxis": {**axis, "title": {"text": x_title}, "showgrid": False},
        "yaxis": {**axis, "title": {"text": y_title}, "nticks": 6},
    }
    return go.Figure(data=list(traces), layout=layout)


def _error(value: float, interval: Interval) -> dict[str, object]:
    if not interval.bounded:
        return {"visible": False}
    spread = {"array": [max(interval.high - value, 0.0)], "arrayminus": [max(value - interval.low, 0.0)]}
    return {"type": "data", "symmetric": False, "thickness": 1.5, "width": 4, **spread}


def _reach(errors: Sequence[float | None]) -> dict[str, object]:
    return {"type": "data", "array": [REACH * (error or 0.0) for error in errors], "thickness": 1, "width": 3}


def plot_json(figure: go.Figure) -> str:
    """Return a figure as JSON that a page may hold anywhere."""
    return str(figure.to_json()).replace("<", "\\u003c")
