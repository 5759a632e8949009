"""Reductions over the True entries of a mask; what lies elsewhere never matters, not even a NaN."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `values` where `mask` (bool, same shape) is True, a scalar; 0 when nothing is."""
    return values.masked_fill(~mask, 0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` where `mask` (bool, same shape) is True, a scalar; 0 when nothing is."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` shifted and scaled to mean 0 and (population) variance 1 over the mask, 0 off it.

    A spread that is only the rounding noise of equal values counts as none and gives 0, so that it is
    never blown up to size 1.
    """
    exact = values.double().masked_fill(~mask, 0)
    centred = (exact - masked_mean(exact, mask)).masked_fill(~mask, 0)
    std = masked_mean(centred.square(), mask).sqrt()
    noise = 8 * torch.finfo(values.dtype).eps * exact.abs().amax()
    return torch.where(std > noise, centred / std, 0.0).to(values.dtype)


def last_index(mask: Tensor) -> Tensor:
    """Return the index of the last True of each row of `mask` `[B, T]`, `[B]` int64; -1 for a row without one."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)
