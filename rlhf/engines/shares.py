"""How the ranks of a group share the rows of a batch, and how their results come together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.pulse import PULSE
from rlhf.types import Portable, Rows, TokenScores

B = TypeVar("B", bound=Rows)


@dataclass(frozen=True)
class Part(Portable):
    """What one rank found for some rows of a batch: `values` is `[rows, ..]`, in the order of `rows`."""

    rows: list[int]
    values: Tensor


def filled(batch: B, passes: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], B]]:
    """Yield (rows, those rows with shared padding dropped) of each pass; an empty pass gets the shortest row.

    Each pass counts as progress.
    """
    shortest = int(batch.lengths().argmin())
    for rows in passes:
        yield rows, batch.select(rows or [shortest]).trim()
        PULSE.beat()


def assemble(parts: Sequence[Part]) -> Tensor:
    """Return the values of all rows in order, `[B]` or `[B, T]`; every row must be in exactly one part."""
    count = sum(len(part.rows) for part in parts)
    result = torch.empty((count, *parts[0].values.shape[1:]), dtype=parts[0].values.dtype)
    for part in parts:
        result[part.rows] = part.values
    return result


def token_scores(parts: Sequence[Part]) -> TokenScores:
    """Return the scores of all rows, from parts of `[rows, 2, T]`: logprob and entropy."""
    values = assemble(parts)
    return TokenScores(values[:, 0], values[:, 1])
