"""Which rows make which batch. Nothing here has state: a resumed run asks for the same step and gets the same rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from rlhf.errors import DataError


def permutation(rows: int, seed: int, epoch: int) -> list[int]:
    """Return the order of `0 .. rows - 1` in one epoch, determined by (rows, seed, epoch) alone."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
    return torch.randperm(rows, generator=generator).tolist()


def batches(rows: int, batch_size: int, epochs: int, seed: int, group: int = 1) -> Iterator[list[int]]:
    """Yield the row indices of each optimizer step; the last batch of an epoch may be smaller.

    Where batches of `batch_size` can hold groups of `group` neighbouring rows (a prompt's samples) whole, groups are
    shuffled and stay together, so that their prompt goes through a model once; else single rows are.
    """
    unit = group if batch_size % group == 0 and rows % group == 0 else 1
    for epoch in range(epochs):
        first = [unit * place for place in permutation(rows // unit, seed, epoch)]
        order = [row for start in first for row in range(start, start + unit)]
        for start in range(0, rows, batch_size):
            yield order[start : start + batch_size]


def steps(rows: int, batch_size: int, epochs: int) -> int:
    """Return how many batches `batches` yields."""
    return epochs * -(-rows // batch_size)


def prompt_batch(rows: int, size: int, step: int, seed: int) -> list[int]:
    """Return the `size` rows of RL step `step` (from 0), walking through one permutation per epoch.

    A batch never spans two epochs, so it holds no prompt twice; the `rows % size` rows left over in an epoch
    wait for the next. Raises DataError when there are fewer rows than a step takes.
    """
    if size > rows:
        raise DataError(f"a step takes {size} prompts but there are only {rows}: lower prompts_per_step or add prompts")
    epoch, place = divmod(step, rows // size)
    return permutation(rows, seed, epoch)[place * size : (place + 1) * size]
