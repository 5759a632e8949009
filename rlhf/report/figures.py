"""The report's plots, as Plotly figures; what they look like in light or dark is the page's part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import plotly.graph_objects as go

from rlhf.report.curves import Curve, series
from rlhf.report.results import CandidateResult, Comparison, Interval

# Seen well on white and on dark, and apart from each other with colour-blind eyes (after Tol's bright scheme).
PALETTE = ("#4a86c5", "#e0713a", "#2b9d6e", "#a968c0", "#c9992b", "#d1506f")
PLAIN = "#7d8694"

# Shown first, in this order; what a stage logs beyond these comes after, by name.
LEADING = (
    "loss",
    "accuracy",
    "eval_loss",
    "eval_accuracy",
    "gold_accuracy",
    "reward",
    "gold",
    "kl",
    "entropy",
    "length",
    "margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logprob",
    "rejected_logprob",
    "unfinished",
    "policy_loss",
    "value_loss",
    "explained_variance",
    "approx_kl",
    "clip_fraction",
    "agreement",
    "kl_penalty",
    "grad_norm",
    "learning_rate",
    "tokens_per_second",
)
MOST_POINTS = 800


@dataclass(frozen=True)
class Plot:
    """One plot: its heading, and the figure as Plotly JSON with no `<` in it."""

    title: str
    json: str


def frontier_plots(comparison: Comparison, curves: Mapping[str, Curve]) -> list[Plot]:
    """Plot gold and reward against the KL to the reference, a point per candidate (Gao et al. 2023).

    A stage that logged `kl` with `gold` or `reward` adds the path it took while training, as a line.
    """
    metrics: tuple[tuple[Literal["gold", "reward"], str], ...] = (("gold", "Gold reward"), ("reward", "Reward model"))
    plots = []
    for metric, label in metrics:
        paths = [_path(name, curve, metric, colour(comparison, name)) for name, curve in curves.items()]
        points = [_point(item, metric, colour(comparison, item.name)) for item in comparison.candidates]
        figure = _figure([*filter(None, paths), *points], "KL to the reference, nats per response", label)
        plots.append(Plot(f"{label} against KL", _json(figure)))
    return plots


def curve_plots(curve: Curve, tint: str) -> list[Plot]:
    """Plot each metric of a stage over its steps: every point, and the running mean where there are many."""
    names = {name for row in curve for name in row} - {"step", "time"}
    ranked = sorted(names, key=lambda name: (LEADING.index(name) if name in LEADING else len(LEADING), name))
    return [Plot(name, _json(_curve(points, tint))) for name in ranked if (points := series(curve, name))]


def colour(comparison: Comparison, name: str) -> str:
    """Return the colour of a candidate, the same all over the page; grey for stages that are no candidate."""
    names = [item.name for item in comparison.candidates]
    return PALETTE[names.index(name) % len(PALETTE)] if name in names else PLAIN


def _point(item: CandidateResult, metric: Literal["gold", "reward"], tint: str) -> go.Scatter:
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


def _path(name: str, curve: Curve, metric: str, tint: str) -> go.Scatter | None:
    kl, heights = dict(series(curve, "kl")), dict(series(curve, metric))
    steps = [step for step in kl if step in heights]
    if not steps:
        return None
    return go.Scatter(
        x=[kl[step] for step in steps],
        y=[heights[step] for step in steps],
        customdata=steps,
        mode="lines+markers",
        name=f"{name} while training",
        opacity=0.45,
        line={"color": tint, "width": 1.5},
        marker={"color": tint, "size": 4},
        hovertemplate=f"{name}, step %{{customdata:d}}<br>KL %{{x:.3g}}<br>{metric} %{{y:.3g}}<extra></extra>",
    )


def _curve(points: Sequence[tuple[float, float]], tint: str) -> go.Figure:
    points = _thin(points)
    steps, values = [step for step, _ in points], [value for _, value in points]
    smooth = len(points) >= 24
    raw = go.Scatter(
        x=steps,
        y=values,
        mode="lines" if len(points) > 1 else "markers",
        opacity=0.35 if smooth else 1.0,
        line={"color": tint, "width": 1 if smooth else 2},
        marker={"color": tint, "size": 7},
        hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
    )
    if not smooth:
        return _figure([raw], "", "")
    reach = max(1, len(points) // 24)
    means = [_mean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))]
    line = go.Scatter(x=steps, y=means, mode="lines", line={"color": tint, "width": 2}, hoverinfo="skip")
    return _figure([raw, line], "", "")


def _figure(traces: Sequence[go.Scatter], x_title: str, y_title: str) -> go.Figure:
    axis = {"zeroline": False, "automargin": True, "ticks": ""}
    layout = {
        "template": "none",
        "showlegend": False,
        "margin": {"l": 44, "r": 16, "t": 12, "b": 34},
        "xaxis": {**axis, "title": {"text": x_title}, "showgrid": False},
        "yaxis": {**axis, "title": {"text": y_title}, "nticks": 6},
    }
    return go.Figure(data=list(traces), layout=layout)


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Average neighbours until a page can hold the curve."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], _mean([value for _, value in group])) for group in groups]


def _error(value: float, interval: Interval) -> dict[str, object]:
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return {"visible": False}
    spread = {"array": [max(interval.high - value, 0.0)], "arrayminus": [max(value - interval.low, 0.0)]}
    return {"type": "data", "symmetric": False, "thickness": 1.5, "width": 4, **spread}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _json(figure: go.Figure) -> str:
    return str(figure.to_json()).replace("<", "\\u003c")
