"""Token sequences on disk instead of in memory: an Arrow file in the user's cache, mapped and read row by row.

A Python tuple of ids takes tens of bytes a token, and the text that it was made of as much again; data larger than
memory is therefore tokenised as it is read, and what batches need is picked by index. The file loses its name as soon
as it is mapped, so nothing is left of it when the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlhf.data.lazy import Lazy
from rlhf.data.sequences import TokenSequence
from rlhf.disk import failures_told
from rlhf.models.cache import default_cache

PART = 1 << 16
"""Tokens, about, that are in memory at once while the file is written."""

REFUSED = "tokenised data cannot be written to the cache (RLHF_CACHE names another place)"


def stored(sequences: Iterable[TokenSequence]) -> Lazy[TokenSequence]:
    """Write the sequences down one after the other, and return them as a lazy sequence.

    Raises:
        ResourceError: the cache has no room for them.
    """
    import pyarrow.ipc

    folder = default_cache() / "tokens"
    schema = pyarrow.schema(
        [("tokens", pyarrow.list_(pyarrow.int32())), ("response_mask", pyarrow.list_(pyarrow.bool_()))]
    )
    with failures_told(folder, REFUSED):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
            for part in _parts(sequences):
                columns = {
                    "tokens": [row.tokens for row in part],
                    "response_mask": [row.response_mask for row in part],
                }
                with failures_told(folder, REFUSED):
                    writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, schema))
        table = pyarrow.ipc.open_file(pyarrow.memory_map(name)).read_all()
    finally:
        Path(name).unlink(missing_ok=True)
    tokens, masks = table.columns

    def row(place: int) -> TokenSequence:
        return TokenSequence(tuple(tokens[place].as_py()), tuple(masks[place].as_py()))

    return Lazy(row, len(table))


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
