"""Typed rows to token ids, through the tokenizer's chat template and nothing else.

Rows longer than the limit are errors: a cut answer has no end, and a cut prompt asks something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlhf.data.rows import Conversation, LabelledRow, PreferenceRow, PromptRow, TextRow
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


def prompt_sequence(row: PromptRow, tokenizer: ChatTokenizer, max_prompt_tokens: int) -> TokenSequence:
    """Tokenise a prompt up to where the assistant speaks, nothing marked; DataError on an over-long one."""
    with _place(row.where):
        tokens = tokenizer.prompt_ids(row.messages)
        _check_length("prompt", len(tokens), max_prompt_tokens, "max_prompt_tokens")
    return TokenSequence(tuple(tokens), (False,) * len(tokens))


def tokenize_prompts(rows: Sequence[PromptRow], tokenizer: ChatTokenizer, max_prompt_tokens: int) -> Sequence[Prompt]:
    """Tokenise prompts, which lie on disk and are made when they are asked for.

    DataError on an over-long prompt or an id used twice.
    """
    from rlhf.data.prompts import tokenized_prompts

    return tokenized_prompts(rows, tokenizer, max_prompt_tokens)


def preference_sequence(row: PreferenceRow, tokenizer: ChatTokenizer, max_length: int) -> TokenPair:
    """Tokenise a pair, each answer ending with end-of-sequence; DataError on a side over `max_length` tokens."""
    with _place(row.where):
        prompt, answers = tokenizer.completion_pair_ids(row.prompt, [row.chosen, row.rejected])
        chosen, rejected = (
            _answered(name, prompt, ids, max_length) for name, ids in zip(("chosen", "rejected"), answers, strict=True)
        )
    return TokenPair(chosen, rejected, row.margin)


def preference_sequences(rows: Iterable[PreferenceRow], tokenizer: ChatTokenizer, max_length: int) -> list[TokenPair]:
    """Tokenise pairs as `preference_sequence` does."""
    return [preference_sequence(row, tokenizer, max_length) for row in rows]


def labelled_sequence(row: LabelledRow, tokenizer: ChatTokenizer, max_length: int) -> TokenSequence:
    """Tokenise a labelled answer, ending with end-of-sequence; DataError on one over `max_length` tokens."""
    with _place(row.where):
        return _answered("completion", *tokenizer.completion_ids(row.prompt, row.completion), max_length)


def labelled_sequences(
    rows: Sequence[LabelledRow], tokenizer: ChatTokenizer, max_length: int
) -> list[LabelledSequence]:
    """Tokenise labelled answers as `labelled_sequence` does."""
    return [LabelledSequence(labelled_sequence(row, tokenizer, max_length), row.desirable) for row in rows]


def _answered(name: str, prompt: Sequence[int], response: Sequence[int], max_length: int) -> TokenSequence:
    _check_length(f"prompt + {name}", len(prompt) + len(response), max_length, "max_length")
    return answered(tuple(prompt), tuple(response))


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
