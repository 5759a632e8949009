"""The comparison as a JSON file, for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rlhf.errors import DataError
from rlhf.report.results import CandidateResult, Comparison, Interval, PairedDifference


def write_json(path: Path, comparison: Comparison) -> None:
    """Write the comparison, field by field; an interval is `[low, high]`, with null where it is unbounded."""
    path.write_text(json.dumps(_plain(comparison), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Comparison:
    """Read back what `write_json` wrote; raises DataError for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        candidates = tuple(CandidateResult(**_intervals(item)) for item in document.pop("candidates"))
        differences = tuple(PairedDifference(**_intervals(item)) for item in document.pop("differences"))
        return Comparison(candidates=candidates, differences=differences, **document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}:1: not a comparison report ({error}); run the compare stage again") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return [_plain(value.low), _plain(value.high)]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Comparison | CandidateResult | PairedDifference):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    return value


def _intervals(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _interval(*value) if name.endswith("ci") else value for name, value in item.items()}


def _interval(low: float | None, high: float | None) -> Interval:
    return Interval(-math.inf if low is None else low, math.inf if high is None else high)
