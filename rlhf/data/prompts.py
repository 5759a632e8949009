"""Prompts on disk: rows and their tokens are made when they are asked for, however many there are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlhf.data.content import digest, tokenizer_content
from rlhf.data.encoding import PLAIN, characters, encode_prompts
from rlhf.data.kept import write
from rlhf.data.lazy import Lazy
from rlhf.data.metadata import packed, unpacked
from rlhf.data.reading import Say, each_prompt
from rlhf.data.recognise import source_name
from rlhf.data.rows import PromptRow
from rlhf.data.store import TokenFile, schema
from rlhf.data.tokenized import kept_file
from rlhf.data.workers import in_parts, worked
from rlhf.errors import DataError
from rlhf.recipe.base import HubData, PathData
from rlhf.types import Prompt

if TYPE_CHECKING:
    import pyarrow

    from rlhf.models.tokenizer import ChatTokenizer

COLUMNS = ("id", "messages", "metadata")


class PromptRows(Lazy[PromptRow]):
    """The prompts of a source, read from its file in the cache."""

    def __init__(self, source: PathData | HubData, batches: Sequence[pyarrow.RecordBatch], odd: Mapping[int, Any]):
        import pyarrow

        self.source, self.odd = source, odd
        table = pyarrow.Table.from_batches(batches, _schema())
        self.columns = table.columns
        super().__init__(self._row, len(table))

    def _row(self, place: int) -> PromptRow:
        name, said, packed_metadata, number = (column[place].as_py() for column in self.columns)
        messages = tuple(json.loads(said))
        metadata = self.odd[place] if packed_metadata is None else unpacked(packed_metadata)
        return PromptRow(name, messages, messages[-1]["content"], metadata, f"{source_name(self.source)}:{number}")


def prompt_rows(source: PathData | HubData) -> PromptRows:
    """Read prompts; errors as in `each_prompt`."""
    odd: dict[int, Any] = {}

    def batches(say: Say) -> Iterator[pyarrow.RecordBatch]:
        import pyarrow

        first = 0
        for part in in_parts(each_prompt(source, say), _size):
            metadata = [packed(row.metadata) for row in part]
            odd.update((first + at, part[at].metadata) for at, text in enumerate(metadata) if text is None)
            first += len(part)
            columns = [
                [row.id for row in part],
                [json.dumps(row.messages, ensure_ascii=False) for row in part],
                metadata,
                [int(row.where.rpartition(":")[2]) for row in part],
            ]
            arrays = [pyarrow.array(values, kind) for values, kind in zip(columns, _schema().types, strict=True)]
            yield pyarrow.RecordBatch.from_arrays(arrays, schema=_schema())

    file = kept_file(source, {"kind": "prompt rows"}, _schema(), batches, complete=lambda: not odd)
    return PromptRows(source, file.batches, odd)


def tokenized_prompts(rows: Sequence[PromptRow], tokenizer: ChatTokenizer, max_prompt_tokens: int) -> Sequence[Prompt]:
    """Tokenise prompts; DataError on an over-long one, or an id used twice."""
    work = partial(encode_prompts, tokenizer=tokenizer, max_length=max_prompt_tokens)
    if isinstance(rows, PromptRows):
        content = {"kind": "prompts", "max_length": max_prompt_tokens, **tokenizer_content(tokenizer)}
        file = kept_file(rows.source, content, schema(PLAIN), lambda _: _encoded(work, rows))
    else:
        file = write(None, schema(PLAIN), _encoded(work, rows))
    tokens = TokenFile(file)

    def prompt(place: int) -> Prompt:
        row = rows[place]
        return Prompt(row.id, tokens[place].tokens, row.text, row.metadata)

    return Lazy(prompt, len(rows))


def _encoded(
    work: Callable[[list[PromptRow]], pyarrow.RecordBatch], rows: Iterable[PromptRow]
) -> Iterator[pyarrow.RecordBatch]:
    return worked(work, in_parts(_unique(rows), characters))


def _unique(rows: Iterable[PromptRow]) -> Iterator[PromptRow]:
    """Yield rows; DataError where an id comes a second time. A few bytes stand for each id."""
    seen: set[int] = set()
    for place, row in enumerate(rows):
        name = int.from_bytes(digest(row.id)[:8], "little")
        earlier = (known for known in islice(rows, place) if known.id == row.id) if name in seen else iter(())
        if first := next(earlier, None):
            raise DataError(f"{row.where}: prompt id '{row.id}' is taken already, by {first.where}")
        seen.add(name)
        yield row


def _size(row: PromptRow) -> int:
    return characters(row) + 200


def _schema() -> pyarrow.Schema:
    import pyarrow

    text = pyarrow.string()
    return pyarrow.schema([*((name, text) for name in COLUMNS), ("number", pyarrow.int64())])
