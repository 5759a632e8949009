"""What a model says about a batch, at the response positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from rlhf.algorithms.logprobs import align, entropies, selected_logprobs
from rlhf.algorithms.masked import last_index
from rlhf.engines.shares import Part, filled
from rlhf.models.scalar import token_values
from rlhf.types import TokenBatch

SHORT = 256


def response_logits(model: nn.Module, batch: TokenBatch, temperature: float) -> tuple[Tensor, Tensor, slice]:
    """Return logits `[B, K, V]`, their target tokens `[B, K]` and the columns of `[B, T]` they are about.

    Only the span of columns that holds response tokens goes through the language-model head; K is 0 without any.
    """
    columns = batch.response_mask[:, 1:].any(dim=0).nonzero().flatten() + 1
    span = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(1, 1)
    keep = torch.arange(span.start - 1, span.stop - 1, device=batch.tokens.device)
    with short_attention(batch):
        out = model(
            input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), logits_to_keep=keep, use_cache=False
        )
    logits = out.logits if temperature == 1 else out.logits / temperature
    return logits, batch.tokens[:, span], span


def short_attention(batch: TokenBatch) -> AbstractContextManager[None]:
    """Choose plain matrix products for the attention of short rows on CPU.

    torch's CPU flash kernel is slower there, most of all backward (7 against 20 ms a layer at 16 x 44 tokens).
    """
    if batch.tokens.device.type == "cpu" and batch.width <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def response_logprobs(model: nn.Module, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """Return differentiable logprobs of the response tokens, `[B, T]` float32, 0 elsewhere."""
    logits, targets, span = response_logits(model, batch, temperature)
    return _place(selected_logprobs(logits, targets), batch, span)


def _place(part: Tensor, batch: TokenBatch, span: slice) -> Tensor:
    padded = pad(part, (span.start, batch.width - span.stop))
    return padded.masked_fill(~batch.response_mask, 0.0)


def response_values(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return differentiable values before each response token, `[B, T]` float32, 0 elsewhere."""
    with short_attention(batch):
        values = token_values(model, batch.tokens, batch.attention_mask)
    return align(values[:, :-1]).masked_fill(~batch.response_mask, 0.0)


def sequence_scores(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return the scalar head at the last real token of each sequence, `[B]` float32, differentiable."""
    with short_attention(batch):
        values = token_values(model, batch.tokens, batch.attention_mask)
    return values.gather(1, last_index(batch.attention_mask)[:, None]).squeeze(1)


def token_scores(model: nn.Module, batch: TokenBatch, temperature: float) -> Tensor:
    """Return logprobs and entropies of the response tokens, `[B, 2, T]` float32, 0 elsewhere."""
    logits, targets, span = response_logits(model, batch, temperature)
    found = (selected_logprobs(logits, targets), entropies(logits))
    return torch.stack([_place(values, batch, span) for values in found], dim=1)


@torch.no_grad()
def score_share(score: Callable[[TokenBatch], Tensor], batch: TokenBatch, passes: Sequence[Sequence[int]]) -> Part:
    """Return what `score` says of the rows of all passes: one value a row, or `[.., T]` padded to the batch's width.

    An empty pass runs the shortest row and drops it, so that ranks that exchange weights make equally many.
    """
    parts = []
    for rows, part in filled(batch, passes):
        values = score(part).cpu()[: len(rows)]
        parts.append(pad(values, (0, batch.width - part.width)) if values.ndim > 1 else values)
    return Part([row for rows in passes for row in rows], torch.cat(parts))
