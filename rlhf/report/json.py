"""The comparison as a JSON file, for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from rlhf.errors import DataError
from rlhf.report.results import Comparison
from rlhf.report.wins import leaderboard


def write_json(path: Path, comparison: Comparison) -> None:
    """Write the comparison, field by field, and AlpacaEval's columns under `leaderboard`.

    An interval is `[low, high]`, with null where it is unbounded; what was not measured is null.
    """
    document = json.loads(TypeAdapter(Comparison).dump_json(comparison))
    document["leaderboard"] = [asdict(row) for row in leaderboard(comparison)]
    path.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Comparison:
    """Read back what `write_json` wrote; raises DataError for anything else."""
    try:
        return TypeAdapter(Comparison).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}:1: not a comparison report ({reason}); `rlhf run` with the run's recipe writes it again"
        ) from error
