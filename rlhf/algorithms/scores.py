"""What happens to the score of a whole response before it becomes a reward; all tensors are `[B]`."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.masked import whiten


def whiten_scores(scores: Tensor) -> Tensor:
    """Return scores shifted and scaled to mean 0 and (population) variance 1 over the batch; 0 where all are equal."""
    return whiten(scores, torch.ones_like(scores, dtype=torch.bool))


def overlong_penalty(lengths: Tensor, max_tokens: int, buffer: int) -> Tensor:
    """Return by how much of the full penalty each response is too long, from 0 to 1.

    0 up to max_tokens - buffer response tokens, then growing linearly to 1 at max_tokens: minus the soft overlong
    punishment of DAPO (Yu et al. 2025, eq. 13).
    """
    return ((lengths - (max_tokens - buffer)) / buffer).clamp(0, 1)


def flat_groups(scores: Tensor, groups: Tensor) -> Tensor:
    """Return `[G]` bool, True for the groups whose scores are all equal: comparing their samples says nothing.

    groups `[B]` int64 numbers the group of each row from 0; a group of one is flat.
    """
    shape = int(groups.max()) + 1 if len(groups) else 0
    lowest = scores.new_full((shape,), float("inf")).scatter_reduce(0, groups, scores, "amin")
    highest = scores.new_full((shape,), -float("inf")).scatter_reduce(0, groups, scores, "amax")
    return lowest == highest
