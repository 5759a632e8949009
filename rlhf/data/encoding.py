"""Rows to batches of a token file: the work that is done on all cores, and the schemas of what it makes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from rlhf.data import store
from rlhf.data.content import digest
from rlhf.data.rows import Conversation, LabelledRow, Message, PreferenceRow, PromptRow, TextRow
from rlhf.data.tokenize import (
    conversation_sequence,
    labelled_sequence,
    preference_sequence,
    prompt_sequence,
    text_sequence,
)

if TYPE_CHECKING:
    import pyarrow

    from rlhf.models.tokenizer import ChatTokenizer

PAIRS = {"prompt": "digest", "margin": "float64"}
LABELLED = {"prompt": "digest", "answers": "int32", "desirable": "bool"}
TEXTS = {"text": "digest", "label": "string"}
PLAIN: dict[str, str] = {}
"""What stands beside each sequence. A pair is two of them; `answers` says how many of a record's follow each other."""


def characters(row: Any) -> int:
    """Return about how much text a row, or a tuple of rows, holds."""
    match row:
        case tuple():
            return sum(map(characters, row))
        case Conversation():
            return _length(row.messages)
        case PromptRow():
            return _length(row.messages)
        case LabelledRow():
            return _length(row.prompt) + len(row.completion)
        case PreferenceRow():
            return _length(row.prompt) + len(row.chosen) + len(row.rejected)
        case TextRow():
            return len(row.text)
    raise TypeError(f"no row of a source: {type(row).__name__}")


def encode_pairs(
    rows: Iterable[tuple[PreferenceRow, ...]], tokenizer: ChatTokenizer, max_length: int
) -> pyarrow.RecordBatch:
    """Return the chosen and the rejected sequence of each pair in turn, with the prompt's digest and the margin."""
    pairs = list(chain.from_iterable(rows))
    tokens = [preference_sequence(pair, tokenizer, max_length) for pair in pairs]
    prompts = [prompt_digest(pair.prompt) for pair in pairs]
    return store.batch(
        [side for pair in tokens for side in (pair.chosen, pair.rejected)],
        PAIRS,
        {"prompt": _twice(prompts), "margin": _twice([pair.margin for pair in tokens])},
    )


def encode_labelled(
    rows: Iterable[tuple[LabelledRow, ...]], tokenizer: ChatTokenizer, max_length: int
) -> pyarrow.RecordBatch:
    """Return the sequence of each answer, with its prompt's digest, its record's number of answers, and its label."""
    records = list(rows)
    answers = list(chain.from_iterable(records))
    values: dict[str, Sequence[Any]] = {
        "prompt": [prompt_digest(answer.prompt) for answer in answers],
        "answers": [len(record) for record in records for _ in record],
        "desirable": [answer.desirable for answer in answers],
    }
    return store.batch([labelled_sequence(answer, tokenizer, max_length) for answer in answers], LABELLED, values)


def encode_chats(rows: Iterable[Conversation], tokenizer: ChatTokenizer, max_length: int) -> pyarrow.RecordBatch:
    """Return the sequence of each chat."""
    return store.batch([conversation_sequence(row, tokenizer, max_length) for row in rows], PLAIN, {})


def encode_texts(rows: Iterable[TextRow], tokenizer: ChatTokenizer, max_length: int) -> pyarrow.RecordBatch:
    """Return the sequence of each text, with the text's digest and its label as JSON."""
    texts = list(rows)
    values: dict[str, Sequence[Any]] = {
        "text": [digest(row.text) for row in texts],
        "label": [json.dumps(row.label) for row in texts],
    }
    return store.batch([text_sequence(row, tokenizer, max_length) for row in texts], TEXTS, values)


def encode_prompts(rows: Iterable[PromptRow], tokenizer: ChatTokenizer, max_length: int) -> pyarrow.RecordBatch:
    """Return the sequence of each prompt, nothing of it marked."""
    return store.batch([prompt_sequence(row, tokenizer, max_length) for row in rows], PLAIN, {})


def prompt_digest(prompt: Sequence[Message]) -> bytes:
    """Return 16 bytes that stand for a chat."""
    return digest(json.dumps(prompt))


def _length(messages: Iterable[Message]) -> int:
    return sum(len(message["content"]) for message in messages)


def _twice(values: Iterable[Any]) -> list[Any]:
    return [value for value in values for _ in range(2)]
