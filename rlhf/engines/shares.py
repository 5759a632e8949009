"""How the ranks of a group share the rows of a batch, and how their results come together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.engines.microbatch import token_budget


@dataclass(frozen=True)
class Part:
    """What one rank found for some rows of a batch: `values` is `[rows]` or `[rows, T]`, in the order of `rows`."""

    rows: list[int]
    values: Tensor


def rank_shares(lengths: Tensor, ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Return the passes of each rank, each a list of rows, so that all ranks have equally many.

    lengths `[rows]`. Rows are dealt longest first, so the ranks' work is alike; every row is in exactly one pass.
    A rank that runs out of rows gets empty passes.
    """
    order = lengths.argsort(descending=True, stable=True)
    shares = []
    for rank in range(ranks):
        mine = order[rank::ranks]
        shares.append([mine[group].tolist() for group in token_budget(lengths[mine], max_tokens)])
    passes = max(len(share) for share in shares)
    return [share + [[] for _ in range(passes - len(share))] for share in shares]


def assemble(parts: Sequence[Part]) -> Tensor:
    """Return the values of all rows in order, `[B]` or `[B, T]`; every row must be in exactly one part."""
    count = sum(len(part.rows) for part in parts)
    result = torch.empty((count, *parts[0].values.shape[1:]), dtype=parts[0].values.dtype)
    for part in parts:
        result[part.rows] = part.values
    return result
