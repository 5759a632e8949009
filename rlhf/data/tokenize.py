"""Typed rows to token ids, through the tokenizer's chat template and nothing else.

Rows longer than the limit are errors: a cut answer has no end, and a cut prompt asks something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf.data.rows import Conversation, LabelledRow, Message, PreferenceRow, PromptRow, TextRow
from rlhf.data.sequences import LabelledSequence, TokenPair, TokenSequence, answered
from rlhf.errors import DataError
from rlhf.types import Prompt

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer


def conversation_sequence(row: Conversation, tokenizer: ChatTokenizer, max_length: int) -> TokenSequence:
    """Tokenise a chat, the assistant's tokens marked; DataError names a row that exceeds `max_length` tokens."""
    with _place(row.where):
        tokens, mask = tokenizer.conversation_ids(row.messages)
        _check_length("conversation", len(tokens), max_length, "max_length")
    return TokenSequence(tuple(tokens), tuple(mask))


def conversation_sequences(
    rows: Iterable[Conversation], tokenizer: ChatTokenizer, max_length: int
) -> list[TokenSequence]:
    """Tokenise chats as `conversation_sequence` does."""
    return [conversation_sequence(row, tokenizer, max_length) for row in rows]


def text_sequence(row: TextRow, tokenizer: ChatTokenizer, max_length: int) -> TokenSequence:
    """Tokenise a text as it stands, without a chat template and with nothing marked: its label is what is learned."""
    with _place(row.where):
        tokens = tokenizer.text_ids(row.text)
        _check_length("text", len(tokens), max_length, "max_length")
    return TokenSequence(tuple(tokens), (False,) * len(tokens))


def tokenize_prompts(rows: Sequence[PromptRow], tokenizer: ChatTokenizer, max_prompt_tokens: int) -> list[Prompt]:
    """Tokenise prompts up to where the assistant speaks; DataError on an over-long prompt or an id used twice."""
    places: dict[str, str] = {}
    prompts = []
    for row in rows:
        if row.id in places:
            raise DataError(f"{row.where}: prompt id '{row.id}' is taken already, by {places[row.id]}")
        places[row.id] = row.where
        with _place(row.where):
            tokens = tokenizer.prompt_ids(row.messages)
            _check_length("prompt", len(tokens), max_prompt_tokens, "max_prompt_tokens")
        prompts.append(Prompt(row.id, tuple(tokens), row.text, row.metadata))
    return prompts


def preference_sequence(row: PreferenceRow, tokenizer: ChatTokenizer, max_length: int) -> TokenPair:
    """Tokenise a pair, each answer ending with end-of-sequence; DataError on a side over `max_length` tokens."""
    with _place(row.where):
        chosen = _answered("chosen", row.prompt, row.chosen, tokenizer, max_length)
        rejected = _answered("rejected", row.prompt, row.rejected, tokenizer, max_length)
    return TokenPair(chosen, rejected, row.margin)


def preference_sequences(rows: Iterable[PreferenceRow], tokenizer: ChatTokenizer, max_length: int) -> list[TokenPair]:
    """Tokenise pairs as `preference_sequence` does."""
    return [preference_sequence(row, tokenizer, max_length) for row in rows]


def labelled_sequences(
    rows: Sequence[LabelledRow], tokenizer: ChatTokenizer, max_length: int
) -> list[LabelledSequence]:
    """Tokenise labelled answers, each ending with end-of-sequence; DataError on one over `max_length` tokens."""
    sequences = []
    for row in rows:
        with _place(row.where):
            sequence = _answered("completion", row.prompt, row.completion, tokenizer, max_length)
        sequences.append(LabelledSequence(sequence, row.desirable))
    return sequences


def _answered(
    name: str, prompt: Sequence[Message], response: str, tokenizer: ChatTokenizer, max_length: int
) -> TokenSequence:
    prompt_ids, response_ids = tokenizer.completion_ids(prompt, response)
    _check_length(f"prompt + {name}", len(prompt_ids) + len(response_ids), max_length, "max_length")
    return answered(tuple(prompt_ids), tuple(response_ids))


@contextmanager
def _place(where: str) -> Iterator[None]:
    """Put the row's place before what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _check_length(what: str, length: int, limit: int, setting: str) -> None:
    if length > limit:
        raise DataError(f"{what} has {length} tokens, the limit is {limit} ({setting})")
