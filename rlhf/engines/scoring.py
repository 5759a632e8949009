"""What a model says about a batch, at the response positions only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad

from rlhf.algorithms.linear_logprobs import linear_logprobs, linear_token_scores
from rlhf.algorithms.logprobs import align, entropies, selected_logprobs
from rlhf.algorithms.masked import last_index
from rlhf.engines.shares import Part, filled
from rlhf.models.flat import flatten
from rlhf.models.flat_attention import runs_flat
from rlhf.models.head import last_hidden, plain_head, vocabulary
from rlhf.models.prompted import padded_inputs
from rlhf.models.scalar import scalars
from rlhf.models.tuning import unwrapped
from rlhf.types import TokenBatch

SHORT = 256

LARGE = 2**24
"""Logits from which on they are computed in parts: below, writing them all down takes less time."""


def response_logprobs(model: nn.Module, batch: TokenBatch, temperature: float = 1.0) -> Tensor:
    """Return differentiable logprobs of the response tokens, `[B, T]` float32, 0 elsewhere."""
    scored = scored_tokens(batch)
    if (weight := _large_head(model, scored)) is not None:
        found = linear_logprobs(_states(model, batch, scored), weight, batch.tokens[scored], temperature)
    else:
        found = selected_logprobs(_logits(model, batch, scored, temperature), batch.tokens[scored])
    return _place(found, scored)


@torch.no_grad()
def token_scores(model: nn.Module, batch: TokenBatch, temperature: float) -> Tensor:
    """Return logprobs and entropies of the response tokens, `[B, 2, T]` float32, 0 elsewhere; no gradient."""
    scored = scored_tokens(batch)
    if (weight := _large_head(model, scored)) is not None:
        found = linear_token_scores(_states(model, batch, scored), weight, batch.tokens[scored], temperature)
    else:
        logits = _logits(model, batch, scored, temperature)
        found = (selected_logprobs(logits, batch.tokens[scored]), entropies(logits))
    return torch.stack([_place(values, scored) for values in found], dim=1)


def _large_head(model: nn.Module, scored: Tensor) -> Tensor | None:
    """Return the head's weight where the logits of all scored tokens are too many to write them down."""
    if not runs_flat(model) or int(scored.sum()) * vocabulary(model) < LARGE:
        return None
    return plain_head(model)


def _states(model: nn.Module, batch: TokenBatch, scored: Tensor) -> Tensor:
    """Return the hidden states that the scored tokens are predicted from, row by row, `[S, H]`."""
    flat = flatten(batch)
    return last_hidden(model, flat.inputs())[0][flat.index[:, :-1][scored[:, 1:]]]


def _logits(model: nn.Module, batch: TokenBatch, scored: Tensor, temperature: float) -> Tensor:
    """Return the logits of the scored tokens, row by row, `[S, V]`.

    Only the positions that they are predicted from go through the language-model head.
    """
    if runs_flat(model):
        flat = flatten(batch)
        logits = model(**flat.inputs(), logits_to_keep=flat.index[:, :-1][scored[:, 1:]]).logits[0]
    else:
        logits = _padded_logits(model, batch, scored)
    return logits if temperature == 1 else logits / temperature


def scored_tokens(batch: TokenBatch) -> Tensor:
    """Return where a response token stands that something predicts: all but a first token, `[B, T]` bool."""
    mask = batch.response_mask.clone()
    mask[:, 0] = False
    return mask


def _padded_logits(model: nn.Module, batch: TokenBatch, scored: Tensor) -> Tensor:
    """Return the logits of the scored tokens, `[S, V]`; the columns that hold any go through the head."""
    columns = scored.any(dim=0).nonzero().flatten()
    with short_attention(batch):
        inputs, before = padded_inputs(model, batch)
        out = unwrapped(model)(**inputs, logits_to_keep=columns - 1 + before)
    return out.logits[scored[:, columns]]


def short_attention(batch: TokenBatch) -> AbstractContextManager[None]:
    """Choose plain matrix products for the attention of short padded rows on CPU.

    torch's CPU flash kernel is slower there, most of all backward (7 against 20 ms a layer at 16 x 44 tokens).
    """
    if batch.tokens.device.type == "cpu" and batch.width <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def response_values(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return differentiable values before each response token, `[B, T]` float32, 0 elsewhere."""
    return align(_values(model, batch)[:, :-1]).masked_fill(~batch.response_mask, 0.0)


def value_states(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return the hidden states that the values before the response tokens are read from, row by row, `[S, H]`.

    S counts the tokens of `scored_tokens`; what `response_values` gives for them is the head's output on these.
    """
    scored = scored_tokens(batch)
    if runs_flat(model):
        return _states(model, batch, scored)
    with short_attention(batch):
        inputs, before = padded_inputs(model, batch)
        return last_hidden(model, inputs)[:, before:-1][scored[:, 1:]]


def sequence_scores(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return the scalar head at the last real token of each sequence, `[B]` float32, differentiable."""
    return _values(model, batch).gather(1, last_index(batch.attention_mask)[:, None]).squeeze(1)


def class_logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return a classifier's logits at the last real token of each sequence, `[B, C]` float32, differentiable."""
    rows, last = torch.arange(len(batch), device=batch.tokens.device), last_index(batch.attention_mask)
    if runs_flat(model):
        flat = flatten(batch)
        states = last_hidden(model, flat.inputs())[0][flat.index[rows, last]]
    else:
        with short_attention(batch):
            inputs, before = padded_inputs(model, batch)
            states = last_hidden(model, inputs)[rows, before + last]
    return unwrapped(model).score(states)


def _values(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return the scalar head at every position, `[B, T]`; what stands on padding means nothing."""
    if runs_flat(model):
        flat = flatten(batch)
        return scalars(model, flat.inputs())[0][flat.index]
    with short_attention(batch):
        inputs, before = padded_inputs(model, batch)
        return scalars(model, inputs)[:, before:]


def _place(values: Tensor, scored: Tensor) -> Tensor:
    """Put what is of the scored tokens, `[S]`, where they stand, `[B, T]`."""
    return values.new_zeros(scored.shape).masked_scatter(scored, values)


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
