"""Adapters: one record of a known format to one typed row. Those of preferences are in `rlhf.data.preferences`."""

from __future__ import annotations

from rlhf.data.records import Record
from rlhf.data.rows import Conversation, LabelledRow, Message, PromptRow, TextRow
from rlhf.data.turns import answer, conversation, prompt_column
from rlhf.data.validation import chat_column, column, flag_column, label_column, messages_column, text_column
from rlhf.errors import DataError


def openai_messages(record: Record) -> Conversation:
    """`messages`: a list of role/content."""
    return conversation(record, messages_column(record, "messages"))


def sharegpt(record: Record) -> Conversation:
    """`conversations`: a list of from/value (ShareGPT), or of role/content."""
    return conversation(record, messages_column(record, "conversations"))


def prompt_completion(record: Record) -> Conversation:
    """`prompt` and `completion`, each text or messages."""
    return conversation(record, prompt_column(record) + chat_column(record, "completion", "assistant"))


def alpaca(record: Record) -> Conversation:
    """`instruction`, `output` and perhaps `input`, which follows the instruction after a blank line."""
    instruction = text_column(record, "instruction")
    if record.values.get("input"):
        instruction += "\n\n" + text_column(record, "input")
    said: Message = {"role": "assistant", "content": text_column(record, "output")}
    return conversation(record, ({"role": "user", "content": instruction}, said))


def prompt(record: Record) -> PromptRow:
    """`prompt` (text or messages), perhaps `id` (default: the row's number); other columns are metadata."""
    messages = prompt_column(record)
    name = column(record, "id") if "id" in record.values else record.number
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(f"{record.where}: column 'id' must be a string or an integer")
    metadata = {key: value for key, value in record.values.items() if key not in ("id", "prompt")}
    return PromptRow(str(name), messages, messages[-1]["content"], metadata, record.where)


def labelled(record: Record) -> tuple[LabelledRow, ...]:
    """`prompt`, `completion` (text or messages) and `label` (true: desirable), as KTO takes them."""
    asked = prompt_column(record)
    said = answer(record, "completion", asked)
    return (LabelledRow(asked, said, flag_column(record, "label"), record.where),)


def classification(record: Record) -> TextRow:
    """`text` and `label`: the name or the number of its class."""
    return TextRow(text_column(record, "text"), label_column(record, "label"), record.where)
