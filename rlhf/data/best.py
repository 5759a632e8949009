"""The best sample of each prompt that an annotate stage writes, for best-of-n. Token ids travel, as in the pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.data.lines import read_lines, write_lines
from rlhf.data.sequences import TokenSequence, answered
from rlhf.errors import DataError


@dataclass(frozen=True)
class Best:
    """The response that the judge, without label noise, scored highest among a prompt's samples."""

    prompt_id: str
    prompt: str
    prompt_tokens: tuple[int, ...]
    metadata: Mapping[str, Any]
    response: str
    response_tokens: tuple[int, ...]
    score: float


_BEST = TypeAdapter(Best)


def write_best(path: Path, rows: Sequence[Best]) -> None:
    """Write one row a line as JSON; floats keep all their bits. ValueError on a score that is not finite."""
    write_lines(path, rows)


def read_best(path: Path) -> list[Best]:
    """Read what `write_best` wrote; DataError names the file and line of damage."""
    rows = read_lines(path, _BEST)
    if not rows:
        raise DataError(f"{path}:1: no samples")
    return rows


def best_sequences(rows: Sequence[Best]) -> list[TokenSequence]:
    """Return prompt + response of each row, the response marked."""
    return [answered(row.prompt_tokens, row.response_tokens) for row in rows]
