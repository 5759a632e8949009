"""One row of a source as training sees it: its token sequences, and its text cut where training starts and ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rlhf.data.rows import Conversation, LabelledRow, Message, PreferenceRow, PromptRow, TextRow
from rlhf.data.sequences import TokenSequence
from rlhf.data.tokenize import (
    conversation_sequence,
    labelled_sequence,
    preference_sequence,
    prompt_sequence,
    text_sequence,
)

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer

Segment = tuple[str, bool]


def items(row: Any) -> tuple[Any, ...]:
    """Return what a record came to: a row, or the tuple of rows that it already is."""
    return row if isinstance(row, tuple) else (row,)


def parts(item: Any, tokenizer: ChatTokenizer) -> Iterator[tuple[str, TokenSequence]]:
    """Yield the token sequences that training would make of a row, by what they are, without a limit."""
    match item:
        case Conversation():
            yield "conversation", conversation_sequence(item, tokenizer, sys.maxsize)
        case PromptRow():
            yield "prompt", prompt_sequence(item, tokenizer, sys.maxsize)
        case PreferenceRow():
            pair = preference_sequence(item, tokenizer, sys.maxsize)
            yield "prompt + chosen", pair.chosen
            yield "prompt + rejected", pair.rejected
        case LabelledRow():
            yield _labelled(item), labelled_sequence(item, tokenizer, sys.maxsize)
        case TextRow():
            yield "text", text_sequence(item, tokenizer, sys.maxsize)


def said(item: Any) -> Iterator[tuple[str, str]]:
    """Yield the texts of a row, each with the role that says it."""
    match item:
        case Conversation() | PromptRow():
            yield from ((message["role"], message["content"]) for message in item.messages)
        case PreferenceRow() | LabelledRow():
            yield from ((message["role"], message["content"]) for message in item.prompt)
            answers = (item.chosen, item.rejected) if isinstance(item, PreferenceRow) else (item.completion,)
            yield from (("assistant", answer) for answer in answers)
        case TextRow():
            yield "user", item.text


def spelled(row: Any, tokenizer: ChatTokenizer) -> set[str]:
    """Return the control tokens that the texts of a row spell; they are encoded as their letters."""
    texts = (text for item in items(row) for text in said(item))
    return {token for role, text in texts for token in tokenizer.spelled_controls(text, role)}


def _labelled(item: LabelledRow) -> str:
    return f"prompt + {'desirable' if item.desirable else 'undesirable'} completion"


def example_of(row: Any, tokenizer: ChatTokenizer | None) -> dict[str, tuple[Segment, ...]]:
    """Return a row's parts as text, cut where training starts and ends; {} of a tie."""
    shown: dict[str, tuple[Segment, ...]] = {}
    for item in items(row):
        for name, segments in _plain(item) if tokenizer is None else _templated(item, tokenizer):
            shown.setdefault(name, segments)
    return shown


def _templated(item: Any, tokenizer: ChatTokenizer) -> Iterator[tuple[str, tuple[Segment, ...]]]:
    """Yield the parts with special tokens and all; a text's label, which no token stands for, follows it."""
    for name, part in parts(item, tokenizer):
        marked = zip(part.tokens, part.response_mask, strict=True)
        segments = tuple(
            (tokenizer.hf.decode([token for token, _ in run], clean_up_tokenization_spaces=False), trained)
            for trained, run in groupby(marked, key=lambda place: place[1])
        )
        yield name, (*segments, *_class(item)) if isinstance(item, TextRow) else segments


def _plain(item: Any) -> Iterator[tuple[str, tuple[Segment, ...]]]:
    """Yield what the parts would be, without a template."""
    match item:
        case PromptRow():
            yield "prompt", tuple((_line(message), False) for message in item.messages)
        case Conversation():
            yield "conversation", tuple((_line(turn), turn["role"] == "assistant") for turn in item.messages)
        case PreferenceRow():
            asked = tuple((_line(message), False) for message in item.prompt)
            for name, said in (("chosen", item.chosen), ("rejected", item.rejected)):
                yield f"prompt + {name}", (*asked, ("assistant: ", False), (said, True))
        case LabelledRow():
            asked = tuple((_line(message), False) for message in item.prompt)
            yield _labelled(item), (*asked, ("assistant: ", False), (item.completion, True))
        case TextRow():
            yield "text", ((item.text, False), *_class(item))


def _class(item: TextRow) -> tuple[Segment, Segment]:
    return (" -> ", False), (str(item.label), True)


def _line(message: Message) -> str:
    return f"{message['role']}: {message['content']}\n"
