"""Sequences laid end to end as one row of tokens, without padding; a prompt that several share stands once.

Packing as in Krell et al. 2021 (arXiv:2107.02027); what shares a prompt sees it through the attention alone, so hidden
states, losses and gradients are those of the sequences one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.types import TokenBatch


@dataclass(frozen=True)
class Segment:
    """The tokens `[start, stop)` of the row, each of which sees those before it here and the whole of `prefix`.

    `prefix` is the (start, stop) of a segment that stands before it; an empty one where nothing is shared. Of a part of
    a segment `before` tokens, which all of its own see too, stand between the segment's start and its own.
    """

    start: int
    stop: int
    prefix: tuple[int, int] = (0, 0)
    before: int = 0

    @property
    def queries(self) -> int:
        """Tokens of its own."""
        return self.stop - self.start

    @property
    def keys(self) -> int:
        """Tokens that its last token sees, itself included."""
        return self.before + self.queries + self.prefix[1] - self.prefix[0]

    def cut(self, length: int) -> Iterator[Segment]:
        """Yield it in parts of at most `length` queries, none of which has keys that none of its queries sees."""
        for start in range(self.start, self.stop, length):
            yield Segment(start, min(start + length, self.stop), self.prefix, start - self.start)


@dataclass(frozen=True)
class FlatBatch:
    """The `N` tokens of `B` sequences in one row, on the device of the batch that it was made of.

    tokens     `[1, N]` int64
    positions  `[1, N]` int64, of each token in its sequence
    index      `[B, T]` int64, where in the row token (b, t) of the padded batch stands; 0 at padding
    segments   cover the row in order
    """

    tokens: Tensor
    positions: Tensor
    index: Tensor
    segments: tuple[Segment, ...]

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of a transformers model's forward pass."""
        return {"input_ids": self.tokens, "position_ids": self.positions, "flat": self, "use_cache": False}

    @property
    def longest(self) -> int:
        """Keys of the longest segment."""
        return max(segment.keys for segment in self.segments)

    @cached_property
    def query_bounds(self) -> Tensor:
        """Where the segments' queries begin and end, `[segments + 1]` int32."""
        return self._bounds([segment.queries for segment in self.segments])

    @cached_property
    def key_bounds(self) -> Tensor:
        """Where the segments' keys begin and end among those of `key_index`, `[segments + 1]` int32."""
        return self._bounds([segment.keys for segment in self.segments])

    @cached_property
    def key_index(self) -> Tensor | None:
        """Where in the row the keys of all segments stand, one segment after the other; None for each in its place."""
        if all(segment.keys == segment.queries for segment in self.segments):
            return None
        parts = [range(*bounds) for s in self.segments for bounds in (s.prefix, (s.start, s.stop))]
        index = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        return torch.from_numpy(index).to(self.tokens.device)

    def _bounds(self, lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=self.tokens.device)


def flatten(batch: TokenBatch) -> FlatBatch:
    """Lay the sequences of a padded batch end to end; those with the same prompt follow one copy of it."""
    tokens = batch.tokens.cpu().numpy()
    lengths, prompts = (values.cpu().tolist() for values in (batch.lengths(), batch.prompt_lengths()))
    index = np.zeros(tokens.shape, np.int64)
    parts, positions, segments, end = [], [], [], 0

    def lay(row: int, start: int, stop: int, prefix: tuple[int, int]) -> Segment:
        nonlocal end
        parts.append(tokens[row, start:stop])
        positions.append(np.arange(start, stop))
        segments.append(Segment(end, end + stop - start, prefix))
        end += stop - start
        return segments[-1]

    for rows in batch.families():
        shared, prefix = 0, (0, 0)
        if len(rows) > 1:
            shared = prompts[rows[0]]
            trunk = lay(rows[0], 0, shared, prefix)
            prefix = (trunk.start, trunk.stop)
        for row in rows:
            own = lay(row, shared, lengths[row], prefix)
            index[row, :shared] = np.arange(*prefix)
            index[row, shared : lengths[row]] = np.arange(own.start, own.stop)
    device = batch.tokens.device
    made = (np.concatenate(parts)[None], np.concatenate(positions)[None], index)
    tokens_there, positions_there, index_there = (torch.from_numpy(values).to(device) for values in made)
    return FlatBatch(tokens_there, positions_there, index_there, tuple(segments))
