"""Log-probabilities and entropies of tokens, in nats and float32 whatever the dtype of the logits.

Rows of logits are converted a slice at a time, so the only tensors of vocabulary size that live long are
the logits themselves and their gradient, in their own dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

SLICE_ELEMENTS = 2**22
"""Logits converted to float32 at once: 16 MiB."""


def align(next_values: Tensor) -> Tensor:
    """Move what a model says at position t-1 about token t to position t: `[B, T-1]` -> `[B, T]`, 0 at position 0.

    No other function shifts.
    """
    return functional.pad(next_values, (1, 0))


def selected_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log softmax(logits) at `targets`: logits `[..., V]`, targets `[...]` int64 -> `[...]` float32.

    float64 logits give float64. Differentiable once, with respect to the logits.
    """
    flat: Tensor = _SelectedLogprobs.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1))
    return flat.view(targets.shape)


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits), `[..., V]` -> `[...]` float32 nats; a logit of -inf counts as 0."""
    flat = logits.reshape(-1, logits.shape[-1])
    wide = _wide(logits)
    floor = torch.finfo(wide).min
    parts = []
    for rows in _slices(flat):
        logprobs = flat[rows].to(wide).log_softmax(dim=-1).clamp(min=floor)
        parts.append(-(logprobs.exp() * logprobs).sum(dim=-1))
    return torch.cat(parts).view(logits.shape[:-1])


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return each row's sum of token log-probabilities over its mask: `[B, T]` -> `[B]`."""
    return logprobs.masked_fill(~mask, 0).sum(dim=1)


class _SelectedLogprobs(torch.autograd.Function):
    """Logit of the target minus logsumexp; gradient (one-hot - softmax), recomputed slice by slice."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        selected = logits.new_empty(len(logits), dtype=_wide(logits))
        normalisers = torch.empty_like(selected)
        for rows in _slices(logits):
            peak = logits[rows].amax(dim=-1, keepdim=True).to(selected.dtype)
            shifted = logits[rows] - peak
            picked = shifted.gather(-1, targets[rows]).squeeze(-1)
            log_total = shifted.exp_().sum(dim=-1).log_()
            selected[rows] = picked - log_total
            normalisers[rows] = peak.squeeze(-1) + log_total
        ctx.save_for_backward(logits, targets, normalisers)
        return selected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalisers = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _slices(logits):
            column = gradient[rows, None]
            probabilities = (logits[rows] - normalisers[rows, None]).exp_()
            result[rows] = probabilities.mul_(-column).scatter_add_(-1, targets[rows], column)
        return result, None


def _slices(rows: Tensor) -> Iterator[slice]:
    """Cut the rows of `[N, V]` into slices of about SLICE_ELEMENTS; always at least one, which may be empty."""
    step = max(1, SLICE_ELEMENTS // rows.shape[1])
    return (slice(start, start + step) for start in range(0, max(1, len(rows)), step))


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
