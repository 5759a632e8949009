"""The best sample of each prompt that an annotate stage writes, for best-of-n. Token ids travel, as in the pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.data.lines import each_line, write_lines
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


def write_best(path: Path, rows: Iterable[Best]) -> None:
    """Write one row a line as JSON; floats keep all their bits. ValueError on a score that is not finite."""
    write_lines(path, rows)


def each_best(path: Path) -> Iterator[Best]:
    """Yield what `write_best` or an annotate stage wrote, row by row.

    DataError names the file and line of damage, or says that there is no row.
    """
    none = True
    for row in each_line(path, _BEST):
        none = False
        yield row
    if none:
        raise DataError(f"{path}:1: no samples")


def read_best(path: Path) -> list[Best]:
    """Return all rows of a file, which have to fit in memory; DataError if there are none."""
    return list(each_best(path))


def best_sequences(rows: Iterable[Best]) -> Iterator[TokenSequence]:
    """Yield prompt + response of each row, the response marked."""
    return (answered(row.prompt_tokens, row.response_tokens) for row in rows)
