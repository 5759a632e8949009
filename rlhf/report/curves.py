"""The metrics that stages logged while they trained."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.errors import DataError
from rlhf.stage_places import stage_folders

Curve = list[dict[str, float]]


def read_curves(run_folder: Path) -> dict[str, Curve]:
    """Read `stages/<name>/metrics.jsonl` of every stage that has one, in the order in which stages began.

    Rows come back sorted by step, one per step: lines of one step are merged, the later line winning, so a step
    redone after a resume counts once. A torn last line (the process died while writing) is left out; any other
    malformed line raises DataError.
    """
    files = {folder.name: folder / "metrics.jsonl" for folder in stage_folders(run_folder)}
    curves = {name: read_curve(file) for name, file in files.items() if file.is_file()}
    started = {name: min((row.get("time", 0.0) for row in rows), default=0.0) for name, rows in curves.items()}
    return {name: curves[name] for name in sorted(curves, key=lambda name: started[name]) if curves[name]}


def series(curve: Curve, name: str) -> list[tuple[float, float]]:
    """Return the (step, value) points of one metric, leaving out steps that did not log it or logged no number."""
    points = ((row["step"], row[name]) for row in curve if name in row)
    return [(step, value) for step, value in points if abs(value) < float("inf")]


def read_curve(path: Path) -> Curve:
    """Read one `metrics.jsonl`, as `read_curves` says."""
    rows: dict[float, dict[str, float]] = {}
    lines = path.read_bytes().rstrip().split(b"\n")
    for place, line in enumerate(lines):
        try:
            row = json.loads(line.decode("utf-8")) if line.strip() else {}
        except ValueError as error:
            if place == len(lines) - 1:
                break
            raise DataError(f"{path}:{place + 1}: malformed JSON ({error}); delete the line") from error
        if not isinstance(row, dict) or (row and not isinstance(row.get("step"), (int, float))):
            raise DataError(f"{path}:{place + 1}: not a JSON object with a numeric `step`; delete the line")
        if row:
            numbers = {name: float(value) for name, value in row.items() if isinstance(value, (int, float))}
            rows.setdefault(numbers["step"], {}).update(numbers)
    return [rows[step] for step in sorted(rows)]
