"""What formats have in common: who may speak where in a chat."""

from __future__ import annotations

from rlhf.data.records import Record
from rlhf.data.rows import Conversation, Message
from rlhf.data.validation import chat_column
from rlhf.errors import DataError


def conversation(record: Record, messages: tuple[Message, ...]) -> Conversation:
    """Return a chat to imitate; DataError unless the assistant has the last word."""
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{record.where}: the last message must be the assistant's, not the {messages[-1]['role']}'s")
    return Conversation(messages, record.where)


def question(record: Record, messages: tuple[Message, ...], name: str = "column 'prompt'") -> tuple[Message, ...]:
    """Return the messages as a prompt; DataError, which calls them `name`, unless the user has the last word."""
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{record.where}: {name} must end with a message of the user")
    return messages


def prompt_column(record: Record) -> tuple[Message, ...]:
    """Return the column `prompt`, text or messages."""
    return question(record, chat_column(record, "prompt", "user"))


def answer(record: Record, name: str, asked: tuple[Message, ...]) -> str:
    """Return the one assistant message of column `name`, which may repeat the question before it."""
    messages = chat_column(record, name, "assistant")
    if messages[: len(asked)] == asked:
        messages = messages[len(asked) :]
    if [message["role"] for message in messages] != ["assistant"]:
        raise DataError(f"{record.where}: column '{name}' must be the prompt and one message of the assistant")
    return messages[0]["content"]


def common_start(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the messages that two chats begin with in common, up to where the assistant would speak."""
    pairs = list(zip(first, second, strict=False))
    length = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    while length and first[length - 1]["role"] == "assistant":
        length -= 1
    return first[:length]
