"""The report's learning curves: what a stage logged, step by step, and beside it the same on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import plotly.graph_objects as go

from rlhf.report.curves import Curve, series
from rlhf.report.figures import Plot, figure, plot_json

# Shown first, in this order; what a stage logs beyond these comes after, by name.
LEADING = (
    "loss",
    "accuracy",
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
HELDOUT = "heldout_"
Points = Sequence[tuple[float, float]]


def curve_plots(runs: Sequence[Curve], tint: str) -> list[Plot]:
    """Plot each metric of a stage over its steps, from one curve per run.

    One run: every point, and the running mean where there are many. Several: their mean, in a band from the lowest
    to the highest. What was measured on held-out rows is a dotted line (the mean of the runs) in the plot of the same
    metric.
    """
    names = {name for curve in runs for row in curve for name in row} - {"step", "time"}
    ranked = sorted(names, key=lambda name: (LEADING.index(name) if name in LEADING else len(LEADING), name))
    plots = []
    for name in ranked:
        if name.startswith(HELDOUT) and name.removeprefix(HELDOUT) in names:
            continue
        found = [points for curve in runs if (points := series(curve, name))]
        if found:
            drawn = _curve(found[0], tint) if len(found) == 1 else _band(found, tint)
            beside = [points for curve in runs if (points := series(curve, HELDOUT + name))]
            drawn.add_traces([_heldout(beside, tint)] if beside else [])
            plots.append(Plot(f"{name} (dotted: held out)" if beside else name, plot_json(drawn)))
    return plots


def _heldout(runs: Sequence[Points], tint: str) -> go.Scatter:
    """Draw the mean of the runs at each step at which one was evaluated."""
    steps = sorted({step for points in runs for step, _ in points})
    columns = [dict(points) for points in runs]
    return go.Scatter(
        x=steps,
        y=[fmean(column[step] for column in columns if step in column) for step in steps],
        mode="lines+markers",
        name="held out",
        line={"color": tint, "width": 2, "dash": "dot"},
        marker={"color": tint, "size": 6, "symbol": "diamond"},
        hovertemplate="held out, step %{x}: %{y:.4g}<extra></extra>",
    )


def _band(runs: Sequence[Points], tint: str) -> go.Figure:
    columns = [dict(points) for points in runs]
    steps = sorted({step for column in columns for step in column})
    rows = [[column[step] for column in columns if step in column] for step in steps]
    low, high, mean = (
        _thin([(step, fold(row)) for step, row in zip(steps, rows, strict=True)]) for fold in (min, max, fmean)
    )
    around = go.Scatter(
        x=[*(step for step, _ in low), *(step for step, _ in reversed(high))],
        y=[*(value for _, value in low), *(value for _, value in reversed(high))],
        fill="toself",
        fillcolor=tint,
        opacity=0.22,
        mode="none",
        name="lowest to highest run",
        hoverinfo="skip",
    )
    line = go.Scatter(
        x=[step for step, _ in mean],
        y=[value for _, value in mean],
        mode="lines",
        name="mean of the runs",
        line={"color": tint, "width": 2},
        hovertemplate="step %{x}: %{y:.4g}<extra></extra>",
    )
    return figure([around, line], "", "")


def _curve(points: Points, tint: str) -> go.Figure:
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
        return figure([raw], "", "")
    reach = max(1, len(points) // 24)
    means = [fmean(values[max(0, place - reach) : place + reach + 1]) for place in range(len(values))]
    line = go.Scatter(x=steps, y=means, mode="lines", line={"color": tint, "width": 2}, hoverinfo="skip")
    return figure([raw, line], "", "")


def _thin(points: Points) -> Points:
    """Average neighbours until a page can hold the curve."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], fmean(value for _, value in group)) for group in groups]
