"""Adapters: one record of a known format to one typed row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rlhf.data.records import Record
from rlhf.data.rows import Conversation, LabelledRow, Message, PreferenceRow, PromptRow
from rlhf.data.validation import chat_column, column, flag_column, messages_column, number_column, text_column
from rlhf.errors import DataError

Row = TypeVar("Row")
Adapter = Callable[[Record], Row]


def openai_messages(record: Record) -> Conversation:
    """`messages`: a list of role/content."""
    return _conversation(record, messages_column(record, "messages"))


def sharegpt(record: Record) -> Conversation:
    """`conversations`: a list of from/value (ShareGPT), or of role/content."""
    return _conversation(record, messages_column(record, "conversations"))


def prompt_completion(record: Record) -> Conversation:
    """`prompt` and `completion`, each text or messages."""
    prompt = _question(record, chat_column(record, "prompt", "user"))
    completion = chat_column(record, "completion", "assistant")
    return _conversation(record, prompt + completion)


def alpaca(record: Record) -> Conversation:
    """`instruction`, `output` and perhaps `input`, which follows the instruction after a blank line."""
    instruction = text_column(record, "instruction")
    if record.values.get("input"):
        instruction += "\n\n" + text_column(record, "input")
    answer: Message = {"role": "assistant", "content": text_column(record, "output")}
    return _conversation(record, ({"role": "user", "content": instruction}, answer))


def prompt(record: Record) -> PromptRow:
    """`prompt` (text or messages), perhaps `id` (default: the row's number); other columns are metadata."""
    messages = _question(record, chat_column(record, "prompt", "user"))
    name = column(record, "id") if "id" in record.values else record.number
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"{record.where}: column 'id' must be a string or an integer")
    metadata = {key: value for key, value in record.values.items() if key not in ("id", "prompt")}
    return PromptRow(str(name), messages, messages[-1]["content"], metadata, record.where)


def preference(record: Record) -> PreferenceRow:
    """`chosen`, `rejected`, perhaps `prompt` and `margin`; text or messages.

    Without `prompt` the answers are whole chats, and the prompt is what they begin with in common.
    """
    chosen = chat_column(record, "chosen", "assistant")
    rejected = chat_column(record, "rejected", "assistant")
    if "prompt" in record.values or isinstance(record.values["chosen"], str):
        question = _question(record, chat_column(record, "prompt", "user"))
    else:
        question = _question(record, _common_prefix(chosen, rejected), "the common start of chosen and rejected")
    margin = number_column(record, "margin") if "margin" in record.values else 0.0
    answers = [_answer(record, name, question) for name in ("chosen", "rejected")]
    if answers[0] == answers[1]:
        raise DataError(f"{record.where}: chosen and rejected are the same")
    return PreferenceRow(question, answers[0], answers[1], margin, record.where)


def labelled(record: Record) -> tuple[LabelledRow, ...]:
    """`prompt`, `completion` (text or messages) and `label` (true: desirable), as KTO takes them."""
    question = _question(record, chat_column(record, "prompt", "user"))
    answer = _answer(record, "completion", question)
    return (LabelledRow(question, answer, flag_column(record, "label"), record.where),)


def unpaired(record: Record) -> tuple[LabelledRow, ...]:
    """A pair, as in `preference`: the chosen answer is desirable, the rejected one is not."""
    row = preference(record)
    return tuple(
        LabelledRow(row.prompt, answer, desirable, row.where)
        for answer, desirable in ((row.chosen, True), (row.rejected, False))
    )


CONVERSATIONS: dict[str, dict[str, Adapter[Conversation]]] = {
    "messages": {"messages": openai_messages, "conversations": sharegpt},
    "prompt_completion": {
        "prompt": prompt_completion,
        "completion": prompt_completion,
        "instruction": alpaca,
        "output": alpaca,
    },
}
LABELLED: dict[str, dict[str, Adapter[tuple[LabelledRow, ...]]]] = {
    "kto": {"label": labelled, "completion": labelled},
    "preference": {"chosen": unpaired, "rejected": unpaired},
}
"""Format -> the column that gives it away -> its adapter."""


def _conversation(record: Record, messages: tuple[Message, ...]) -> Conversation:
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{record.where}: the last message must be the assistant's, not the {messages[-1]['role']}'s")
    return Conversation(messages, record.where)


def _question(record: Record, messages: tuple[Message, ...], name: str = "column 'prompt'") -> tuple[Message, ...]:
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{record.where}: {name} must end with a message of the user")
    return messages


def _common_prefix(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Message, ...]:
    pairs = list(zip(first, second, strict=False))
    length = next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))
    while length and first[length - 1]["role"] == "assistant":
        length -= 1
    return first[:length]


def _answer(record: Record, name: str, question: tuple[Message, ...]) -> str:
    """Return the one assistant message of `name`, which may repeat the question before it."""
    messages = chat_column(record, name, "assistant")
    if messages[: len(question)] == question:
        messages = messages[len(question) :]
    if [message["role"] for message in messages] != ["assistant"]:
        raise DataError(f"{record.where}: column '{name}' must be the prompt and one message of the assistant")
    return messages[0]["content"]
