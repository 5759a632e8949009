"""Sequences of different lengths to right-padded batches; `B` sequences, `T` the longest one, `P` pairs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from rlhf.data.sequences import LabelledSequence, TokenPair, TokenSequence
from rlhf.types import LabelledBatch, PreferenceBatch, Rollout, TokenBatch


def collate(sequences: Sequence[TokenSequence], pad_id: int) -> TokenBatch:
    """Pad sequences on the right with `pad_id`, `[B, T]`; no token has a rollout logprob."""
    shape = (len(sequences), max(len(sequence.tokens) for sequence in sequences))
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.bool)
    response_mask = torch.zeros(shape, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        tokens[row, :length] = torch.tensor(sequence.tokens, dtype=torch.int64)
        attention_mask[row, :length] = True
        response_mask[row, :length] = torch.tensor(sequence.response_mask, dtype=torch.bool)
    return TokenBatch(tokens, attention_mask, response_mask, torch.zeros(shape))


def collate_rollouts(rollouts: Sequence[Rollout], pad_id: int) -> TokenBatch:
    """Pad prompt + response, `[B, T]`; the engine's logprobs stand on the response tokens, in order."""
    starts = np.array([len(rollout.prompt.tokens) for rollout in rollouts])
    ends = starts + np.array([len(rollout.tokens) for rollout in rollouts])
    columns = np.arange(ends.max())
    attention_mask = columns < ends[:, None]
    response_mask = attention_mask & (columns >= starts[:, None])
    tokens = np.full(attention_mask.shape, pad_id, np.int64)
    tokens[attention_mask] = np.fromiter(
        chain.from_iterable(part for rollout in rollouts for part in (rollout.prompt.tokens, rollout.tokens)), np.int64
    )
    logprobs = np.zeros(attention_mask.shape, np.float32)
    logprobs[response_mask] = np.fromiter(chain.from_iterable(rollout.logprobs for rollout in rollouts), np.float32)
    return TokenBatch(*map(torch.from_numpy, (tokens, attention_mask, response_mask, logprobs)))


def collate_pairs(pairs: Sequence[TokenPair], pad_id: int) -> PreferenceBatch:
    """Pad both sides, each to its own `T`; reference logprobs `[P]` are 0 until the reference fills them in."""
    return PreferenceBatch(
        chosen=collate([pair.chosen for pair in pairs], pad_id),
        rejected=collate([pair.rejected for pair in pairs], pad_id),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        chosen_ref_logprobs=torch.zeros(len(pairs)),
        rejected_ref_logprobs=torch.zeros(len(pairs)),
    )


def collate_labelled(rows: Sequence[LabelledSequence], pad_id: int) -> LabelledBatch:
    """Pad the sequences, `[B, T]`; reference logprobs and the reference point `[B]` are 0 until they are filled in."""
    return LabelledBatch(
        batch=collate([row.sequence for row in rows], pad_id),
        desirable=torch.tensor([row.desirable for row in rows]),
        ref_logprobs=torch.zeros(len(rows)),
        kl=torch.zeros(len(rows)),
    )
