"""A source's rows as token sequences on disk: made on all cores the first time, found in the cache from then on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf.data.classes import Labels
from rlhf.data.content import source_content, tokenizer_content
from rlhf.data.encoding import (
    LABELLED,
    PAIRS,
    PLAIN,
    TEXTS,
    characters,
    encode_chats,
    encode_labelled,
    encode_pairs,
    encode_texts,
)
from rlhf.data.kept import Mapped, cache_key, find, write
from rlhf.data.reading import each_conversation, each_labelled, each_preference, each_text
from rlhf.data.recognise import source_name
from rlhf.data.store import TokenFile, schema
from rlhf.data.workers import in_parts, worked
from rlhf.recipe.base import HubData, PathData

if TYPE_CHECKING:
    import pyarrow

    from rlhf.data.reading import Say
    from rlhf.data.rows import TextRow
    from rlhf.models.tokenizer import ChatTokenizer

log = logging.getLogger("rlhf")
Row = TypeVar("Row")
INTERVAL_S = 10.0
HERE = "{source}"
"""Stands for the source's name in notes that are kept: the next one to say them may know it under another name."""


def silent(_: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Encoder:
    """How rows are tokenised: by whom, to how many tokens at most, and whom to tell how far it is."""

    tokenizer: ChatTokenizer
    max_length: int
    say: Callable[[str], None] = silent


def tokenized_pairs(source: PathData | HubData, encoder: Encoder) -> TokenFile:
    """Return chosen and rejected of each pair in turn, with the columns `PAIRS`; errors as in `each_preference`."""
    return _tokenized(source, "pairs", each_preference, encode_pairs, PAIRS, encoder)


def tokenized_answers(source: PathData | HubData, encoder: Encoder) -> TokenFile:
    """Return labelled answers, with the columns `LABELLED`; errors as in `each_labelled`."""
    return _tokenized(source, "labelled", each_labelled, encode_labelled, LABELLED, encoder)


def tokenized_chats(source: PathData | HubData, encoder: Encoder) -> TokenFile:
    """Return chats, the assistant's tokens marked; errors as in `each_conversation`."""
    return _tokenized(source, "chats", each_conversation, encode_chats, PLAIN, encoder)


def tokenized_texts(source: PathData | HubData, encoder: Encoder) -> TokenFile:
    """Return texts, with the columns `TEXTS`; errors as in `each_text`, and those of `Labels`."""
    return _tokenized(source, "texts", _labelled_texts, encode_texts, TEXTS, encoder)


def kept_file(
    source: PathData | HubData,
    content: Mapping[str, Any],
    shape: pyarrow.Schema,
    batches: Callable[[Say], Iterable[pyarrow.RecordBatch]],
    complete: Callable[[], bool] = lambda: True,
) -> Mapped:
    """Return what is kept of a source under a content that tells it from others, or make it of batches.

    What `batches` says through its argument is said each time, whether it is made or found. A file that is not
    `complete` by itself is not kept.
    """
    told, name = source_content(source), source_name(source)
    key = cache_key({**content, "source": dict(told.content)}) if told else None
    found = find(key) if key else None
    if found is None:
        notes: list[str] = []
        made = batches(lambda note: notes.append(note.replace(name, HERE)))
        found = write(key, shape, made, notes, lambda: told is not None and told.unchanged() and complete())
    for note in found.notes:
        log.warning(note.replace(HERE, name))
    return found


def reported(rows: Iterable[Row], name: str, say: Callable[[str], None]) -> Iterator[Row]:
    """Yield rows, and say now and then how many there have been."""
    started = said = time.monotonic()
    for number, row in enumerate(rows, start=1):
        yield row
        if not number % 256 and (now := time.monotonic()) - said >= INTERVAL_S:
            said = now
            say(f"tokenises {name}: {number:,} rows, {number / (now - started):,.0f} a second")


def _tokenized(
    source: PathData | HubData,
    kind: str,
    read: Callable[[PathData | HubData, Say], Iterable[Any]],
    encode: Callable[..., pyarrow.RecordBatch],
    columns: Mapping[str, str],
    encoder: Encoder,
) -> TokenFile:
    def batches(say: Say) -> Iterator[pyarrow.RecordBatch]:
        work = partial(encode, tokenizer=encoder.tokenizer, max_length=encoder.max_length)
        rows = reported(read(source, say), source_name(source), encoder.say)
        return worked(work, in_parts(rows, characters))

    content = {"kind": kind, "max_length": encoder.max_length, **tokenizer_content(encoder.tokenizer)}
    return TokenFile(kept_file(source, content, schema(columns), batches))


def _labelled_texts(source: PathData | HubData, say: Say) -> Iterator[TextRow]:
    """Yield texts, and check that their labels make classes."""
    labels = Labels()
    for row in each_text(source, say):
        labels.add(row)
        yield row
    labels.classes()
