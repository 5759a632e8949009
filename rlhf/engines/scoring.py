"""What a model says about a batch, at the response positions only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlhf.algorithms.logprobs import align, entropies, selected_logprobs
from rlhf.algorithms.masked import last_index
from rlhf.engines.microbatch import micro_batches
from rlhf.models.scalar import token_values
from rlhf.types import TokenBatch, TokenScores

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
    padded = nn.functional.pad(part, (span.start, batch.width - span.stop))
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


@torch.no_grad()
def score_tokens(model: nn.Module, batch: TokenBatch, temperature: float, max_tokens: int) -> TokenScores:
    """Return logprobs and entropies of the whole batch, `[B, T]`, in passes of at most `max_tokens`."""
    scores = TokenScores(torch.zeros(batch.tokens.shape), torch.zeros(batch.tokens.shape))
    for rows, part in micro_batches(batch, max_tokens):
        logits, targets, span = response_logits(model, part, temperature)
        scores.logprobs[rows, : part.width] = _place(selected_logprobs(logits, targets), part, span).cpu()
        scores.entropy[rows, : part.width] = _place(entropies(logits), part, span).cpu()
    return scores


@torch.no_grad()
def score_rows(
    score: Callable[[nn.Module, TokenBatch], Tensor], model: nn.Module, batch: TokenBatch, max_tokens: int
) -> Tensor:
    """Apply `sequence_scores` (`[B]`) or `response_values` (`[B, T]`) in passes of at most `max_tokens`."""
    parts = [(rows, score(model, part).cpu()) for rows, part in micro_batches(batch, max_tokens)]
    shape = (len(batch),) if parts[0][1].ndim == 1 else tuple(batch.tokens.shape)
    result = torch.zeros(shape)
    for rows, part in parts:
        result[(rows,) if part.ndim == 1 else (rows, slice(part.shape[1]))] = part
    return result
