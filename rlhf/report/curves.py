"""The metrics that stages logged while they trained."""

from __future__ import annotations

import logging
from pathlib import Path

from rlhf.metrics_file import METRICS, MetricsFile, numbers
from rlhf.stage_places import stage_folders

log = logging.getLogger("rlhf")
Curve = list[dict[str, float]]


def read_curves(run_folder: Path) -> dict[str, Curve]:
    """Read `stages/<name>/metrics.jsonl` of every stage that has one, in the order in which stages began.

    Rows come back sorted by step, one per step: lines of one step are merged, the later line winning, so a step
    redone after a resume counts once. A torn last line (the process died while writing) is left out; so is any other
    damaged line, which a warning names.
    """
    files = {folder.name: folder / METRICS for folder in stage_folders(run_folder)}
    curves = {name: read_curve(file) for name, file in files.items() if file.is_file()}
    started = {name: min((row.get("time", 0.0) for row in rows), default=0.0) for name, rows in curves.items()}
    return {name: curves[name] for name in sorted(curves, key=lambda name: started[name]) if curves[name]}


def series(curve: Curve, name: str) -> list[tuple[float, float]]:
    """Return the (step, value) points of one metric, leaving out steps that did not log it or logged no number."""
    points = ((row["step"], row[name]) for row in curve if name in row)
    return [(step, value) for step, value in points if abs(value) < float("inf")]


def read_curve(path: Path) -> Curve:
    """Read one `metrics.jsonl`, as `read_curves` says."""
    found = MetricsFile(path).read()
    if found.damaged:
        more = f" and {len(found.damaged) - 1} more" if len(found.damaged) > 1 else ""
        log.warning("%s:%d: damaged line%s, left out", path, found.damaged[0], more)
    rows: dict[float, dict[str, float]] = {}
    for row in map(numbers, found.rows):
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]
