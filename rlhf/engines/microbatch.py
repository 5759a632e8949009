"""Cutting a batch into passes that fit in memory, longest rows together so that little is padding."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import Tensor

from rlhf.types import Rows

B = TypeVar("B", bound=Rows)


def token_budget(lengths: Tensor, max_tokens: int) -> list[list[int]]:
    """Group rows by length so that rows x longest row <= `max_tokens`; a longer single row stands alone.

    lengths `[rows]`; every row appears in exactly one group.
    """
    groups: list[list[int]] = []
    for row in lengths.argsort(descending=True, stable=True).tolist():
        widest = int(lengths[groups[-1][0]]) if groups else 0
        if groups and (len(groups[-1]) + 1) * widest <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def micro_batches(batch: B, max_tokens: int) -> Iterator[tuple[list[int], B]]:
    """Yield (rows, those rows with shared padding dropped)."""
    for rows in token_budget(batch.lengths(), max_tokens):
        yield rows, batch.select(rows).trim()
