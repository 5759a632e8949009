"""Token sequences on disk instead of in memory: an Arrow file in the user's cache, mapped and read row by row.

A Python tuple of ids takes tens of bytes a token, and the text that it was made of as much again; data larger than
memory is therefore tokenised as it is read, and what batches need is picked by index. A mask is written as the lengths
of its runs, those of what is not marked and of what is in turn.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.kept import Mapped, write
from rlhf.data.lazy import Lazy
from rlhf.data.sequences import TokenSequence

if TYPE_CHECKING:
    import pyarrow

PART = 1 << 16
"""Tokens, about, that are in memory at once while the file is written."""

Columns = Mapping[str, str]
"""Names and Arrow types of what stands beside the tokens of each sequence."""


class TokenFile(Lazy[TokenSequence]):
    """The sequences of a file, made when they are asked for, and the columns beside them."""

    def __init__(self, file: Mapped) -> None:
        self.file = file
        self.ends = list(accumulate(batch.num_rows for batch in file.batches))
        self.parts = [
            tuple(array for name in ("tokens", "runs") for array in _lists(batch.column(name)))
            for batch in file.batches
        ]
        super().__init__(self._row, self.ends[-1] if self.ends else 0)

    def column(self, name: str) -> np.ndarray:
        """Return a column of numbers or flags, one for each sequence."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self.file.batches]
        return np.concatenate(parts) if parts else np.zeros(0)

    def digests(self, name: str) -> np.ndarray:
        """Return a column of 16 bytes as `[rows, 2]` uint64."""
        parts = [np.frombuffer(b"".join(batch.column(name).to_pylist()), np.uint64) for batch in self.file.batches]
        return (np.concatenate(parts) if parts else np.zeros(0, np.uint64)).reshape(-1, 2)

    def numbered(self, name: str) -> tuple[list[str], np.ndarray]:
        """Return the different texts of a column, and which of them each sequence has."""
        known: dict[str, int] = {}
        parts = [
            np.array([known.setdefault(text, len(known)) for text in batch.column(name).to_pylist()], np.int64)
            for batch in self.file.batches
        ]
        return list(known), np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _row(self, place: int) -> TokenSequence:
        part = bisect_right(self.ends, place)
        row = place - (self.ends[part - 1] if part else 0)
        starts, tokens, run_starts, runs = self.parts[part]
        found = runs[run_starts[row] : run_starts[row + 1]].tolist()
        mask: tuple[bool, ...] = ()
        for number, length in enumerate(found):
            mask += (number % 2 == 1,) * length
        return TokenSequence(tuple(tokens[starts[row] : starts[row + 1]].tolist()), mask)


def stored(sequences: Iterable[TokenSequence]) -> TokenFile:
    """Write sequences down one after the other, and return them as they are then read.

    Raises:
        ResourceError: the cache has no room for them.
    """
    return TokenFile(write(None, schema({}), (batch(part, {}, {}) for part in _parts(sequences))))


def schema(columns: Columns) -> pyarrow.Schema:
    """Return the schema of token sequences with further columns."""
    import pyarrow

    lists = [(name, pyarrow.list_(pyarrow.int32())) for name in ("tokens", "runs")]
    return pyarrow.schema(lists + [(name, _type(kind)) for name, kind in columns.items()])


def batch(
    sequences: Sequence[TokenSequence], columns: Columns, values: Mapping[str, Sequence[Any]]
) -> pyarrow.RecordBatch:
    """Return sequences, and the values of the columns beside them, as one batch of a file."""
    import pyarrow

    runs = [_runs(row.response_mask) for row in sequences]
    lists = [_list_array([row.tokens for row in sequences]), _list_array(runs)]
    others = [pyarrow.array(values[name], _type(kind)) for name, kind in columns.items()]
    return pyarrow.RecordBatch.from_arrays(lists + others, schema=schema(columns))


def _type(kind: str) -> pyarrow.DataType:
    import pyarrow

    return pyarrow.binary(16) if kind == "digest" else pyarrow.type_for_alias(kind)


def _list_array(rows: Sequence[Sequence[int]]) -> pyarrow.ListArray:
    import pyarrow

    offsets = np.fromiter(accumulate(map(len, rows), initial=0), np.int32, len(rows) + 1)
    values = np.fromiter((value for row in rows for value in row), np.int32, int(offsets[-1]))
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))


def _lists(column: pyarrow.ListArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the offsets and values of lists, without a copy."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def _runs(mask: Sequence[bool]) -> list[int]:
    lengths = [(marked, sum(1 for _ in run)) for marked, run in groupby(mask)]
    first = [0] if lengths and lengths[0][0] else []
    return first + [length for _, length in lengths]


def _parts(sequences: Iterable[TokenSequence]) -> Iterator[list[TokenSequence]]:
    part: list[TokenSequence] = []
    size = 0
    for sequence in sequences:
        part.append(sequence)
        size += len(sequence.tokens)
        if size >= PART:
            yield part
            part, size = [], 0
    if part:
        yield part
