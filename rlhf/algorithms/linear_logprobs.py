"""Log-probabilities and entropies of tokens from hidden states and the head's weight, without all the logits at once.

With x = hidden @ weight.T / temperature and p = softmax(x), the logprob of token t has the gradient onehot(t) - p in x.
As a row of `hidden` meets the upstream gradient g of its own token alone, the pull on it, (p - onehot(t)) @ weight, is
formed with the logits of the forward pass and waits for its g: no product is computed twice. The weight's gradient,
(p - onehot).T @ (g * hidden), needs p of all rows again. Kept in hidden's dtype that is a sixth (bfloat16) or a third
(float32) of what plain logits and their gradients take, so it is, up to KEPT_BYTES; beyond, the backward pass computes
the logits once more, a part of the vocabulary at a time, so that no row of the gradient is summed in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 2**25
"""Logits computed at once, in hidden's dtype, on CPU: 32 MiB.

Matrix products of few rows waste their reading of the weight: with a vocabulary of 32,000, hidden size 512 and bfloat16
a token takes 2.5 times as long by 16 tokens (1 MiB) as by 512 (32 MiB), 1.2 by 64 and 1.1 by 128.
"""

SLICE_BYTES = 2**20
"""Logits converted to float32 at once on CPU, for each thread: 1 MiB, of which a core's cache holds most."""

DEVICE_BYTES = 2**28
"""Both of them on other devices, where launches count and caches do not: 256 MiB."""

KEPT_BYTES = 2**28
"""Probabilities kept for the weight's gradient, at most: 256 MiB; they save a fourth of the matrix products."""


def linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return log softmax(hidden @ weight.T / temperature) at `targets`, differentiable in `hidden` and `weight`.

    hidden `[S, H]` and weight `[V, H]` of one dtype, targets `[S]` int64 -> `[S]` float32 (float64 from float64), in
    nats. S may be 0. Logits are rounded to hidden's dtype, as a linear layer's are; what follows is in float32.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearLogprobs.apply(hidden, weight, targets, temperature)
    scores = _vector(hidden)
    for rows, logits in _chunks(hidden, weight):
        for part, scaled in _slices(logits, temperature):
            scores[rows][part], _ = _select(scaled, scaled.softmax(dim=-1), targets[rows][part])
    return scores


@torch.no_grad()
def linear_token_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the logprobs at `targets` and the entropies of the rows, each `[S]` float32, in nats; no gradient.

    Arguments as of `linear_logprobs`; a logit of -inf counts as 0 in the entropy.
    """
    scores, entropies = _vector(hidden), _vector(hidden)
    for rows, logits in _chunks(hidden, weight):
        for part, scaled in _slices(logits, temperature):
            probabilities = scaled.softmax(dim=-1)
            scores[rows][part], _ = _select(scaled, probabilities, targets[rows][part])
            below = scaled.sub_(scaled.amax(dim=-1, keepdim=True)).clamp_(min=torch.finfo(scaled.dtype).min)
            entropies[rows][part] = -probabilities.amax(dim=-1).log() - torch.linalg.vecdot(probabilities, below)
    return scores, entropies


class _LinearLogprobs(torch.autograd.Function):
    """Saves the pull on hidden, the rows' log-sum-exp, and p - onehot where the weight learns and it is small."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        pulls, learns = ctx.needs_input_grad[:2]
        small = len(hidden) * len(weight) * hidden.element_size() <= KEPT_BYTES
        kept = hidden.new_empty(len(hidden), len(weight)) if learns and small else None
        pull = torch.empty_like(hidden) if pulls else None
        scores, lse = _vector(hidden), _vector(hidden)
        for rows, logits in _chunks(hidden, weight, kept):
            for part, scaled in _slices(logits, temperature):
                chosen = targets[rows][part]
                probabilities = scaled.softmax(dim=-1)
                scores[rows][part], lse[rows][part] = _select(scaled, probabilities, chosen)
                if pulls or kept is not None:
                    at = chosen[:, None]
                    logits[part] = probabilities.scatter_(1, at, probabilities.gather(1, at) - 1)
            if pull is not None:
                torch.mm(logits, weight, out=pull[rows])
        ctx.temperature = temperature
        ctx.save_for_backward(hidden, weight, targets, lse, pull, kept)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, lse, pull, kept = ctx.saved_tensors
        scale = -upstream[:, None] / ctx.temperature
        toward = None
        if ctx.needs_input_grad[1]:
            weighted = (hidden * scale).to(hidden.dtype)
            if kept is not None:
                toward = kept.T @ weighted
            else:
                toward = _weight_gradient(hidden, weight, targets, lse, ctx.temperature, weighted)
        return None if pull is None else (pull * scale).to(hidden.dtype), toward, None, None


def _weight_gradient(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, temperature: float, weighted: Tensor
) -> Tensor:
    """Return (p - onehot).T @ weighted, `[V, H]`, from logits computed anew, a part of the vocabulary at a time."""
    gradient = torch.empty_like(weight)
    cuts = _cuts(len(weight), len(hidden) * hidden.element_size(), _limit(hidden, CHUNK_BYTES))
    reused = hidden.new_empty(cuts[0].stop * len(hidden))
    for columns in cuts:
        part = weight[columns]
        logits = torch.mm(hidden, part.T, out=reused[: len(hidden) * len(part)].view(len(hidden), len(part)))
        within = targets - columns.start
        for rows, scaled in _slices(logits, temperature):
            probabilities = scaled.sub_(lse[rows, None]).exp_()
            column = within[rows]
            row = ((column >= 0) & (column < len(part))).nonzero().squeeze(1)
            probabilities[row, column[row]] -= 1
            logits[rows] = probabilities
        torch.mm(logits.T, weighted, out=gradient[columns])
    return gradient


def _chunks(hidden: Tensor, weight: Tensor, kept: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits of some rows at a time, `[r, V]`, in `kept`, `[S, V]`, or each in the memory of the last."""
    cuts = _cuts(len(hidden), len(weight) * hidden.element_size(), _limit(hidden, CHUNK_BYTES))
    reused = hidden.new_empty(cuts[0].stop if cuts else 0, len(weight)) if kept is None else kept
    for rows in cuts:
        part = hidden[rows]
        out = reused[: len(part)] if kept is None else kept[rows]
        yield rows, torch.mm(part, weight.T, out=out)


def _slices(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Yield some rows at a time of logits / temperature in float32 or wider; may overwrite the logits."""
    wide = _wide(logits)
    for rows in _cuts(
        len(logits), logits.shape[1] * wide.itemsize, _limit(logits, SLICE_BYTES * torch.get_num_threads())
    ):
        scaled = logits[rows].to(wide)
        yield rows, scaled if temperature == 1 else scaled.div_(temperature)


def _select(scaled: Tensor, probabilities: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logprobs of `chosen` and the log-sum-exp, `[r]` each, by the most probable token: lse = x - log p."""
    top, log_top = scaled.amax(dim=-1), probabilities.amax(dim=-1).log()
    return scaled.gather(1, chosen[:, None]).squeeze(1) - top + log_top, top - log_top


def _cuts(length: int, size: int, limit: int) -> list[slice]:
    """Cut `length` rows of `size` bytes each into slices of at most `limit` bytes, or of one row."""
    step = max(1, limit // max(1, size))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _limit(tensor: Tensor, on_cpu: int) -> int:
    return on_cpu if tensor.device.type == "cpu" else DEVICE_BYTES


def _vector(hidden: Tensor) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=_wide(hidden))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
