"""Typed access to a record's columns; every refusal is a DataError that names file, line and column."""

from __future__ import annotations

import math
from typing import Any

from rlhf.data.records import Record
from rlhf.data.rows import Message
from rlhf.data.strict_json import type_name
from rlhf.errors import DataError

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""What files call who speaks (OpenAI's names, and those of ShareGPT and its kin) -> what chat templates call it."""
FLAGS = {"true": True, "1": True, "false": False, "0": False}


class MissingColumn(DataError):
    """A record lacks what its format needs, so perhaps it is of another one."""


def column(record: Record, name: str) -> Any:
    """Return a column's value; it must be there and not null."""
    if name not in record.values:
        raise MissingColumn(f"{record.where}: column '{name}' missing")
    if record.values[name] is None:
        raise DataError(f"{record.where}: column '{name}' is null")
    return record.values[name]


def text_column(record: Record, name: str) -> str:
    """Return a column that holds non-blank text."""
    value = column(record, name)
    if not isinstance(value, str):
        raise DataError(f"{record.where}: column '{name}' must be a string, not {type_name(value)}")
    if not value.strip():
        raise DataError(f"{record.where}: column '{name}' is empty")
    return value


def list_column(record: Record, name: str) -> list[Any]:
    """Return a column that holds a list which is not empty."""
    value = column(record, name)
    if not isinstance(value, list):
        raise DataError(f"{record.where}: column '{name}' must be a list, not {type_name(value)}")
    if not value:
        raise DataError(f"{record.where}: column '{name}' is empty")
    return value


def label_column(record: Record, name: str) -> str | int:
    """Return a column that holds the name or the number of a class."""
    value = column(record, name)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{record.where}: column '{name}' must be a string or an integer, not {type_name(value)}")
    if isinstance(value, str) and not value.strip():
        raise DataError(f"{record.where}: column '{name}' is empty")
    if isinstance(value, str) and value != value.strip():
        raise DataError(f"{record.where}: column '{name}': {value!r} begins or ends with white space")
    return value


def number_column(record: Record, name: str) -> float:
    """Return a column that holds a finite number; text of one is taken too, since CSV knows nothing else."""
    value = column(record, name)
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not math.isfinite(number):
        shown = repr(value) if isinstance(value, str | float) else type_name(value)
        raise DataError(f"{record.where}: column '{name}' must be a finite number, not {shown}")
    return number


def flag_column(record: Record, name: str) -> bool:
    """Return a column that is true or false; 1 and 0 and the text of all four are taken too, since CSV knows no other.

    Case does not matter.
    """
    value = column(record, name)
    flag = FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if flag is None:
        shown = repr(value) if isinstance(value, str | int | float) else type_name(value)
        raise DataError(f"{record.where}: column '{name}' must be true or false, not {shown}")
    return flag


def chat_column(record: Record, name: str, text_role: str) -> tuple[Message, ...]:
    """Return a column that holds messages, or text, which becomes one message of `text_role`."""
    value = column(record, name)
    if isinstance(value, str):
        return ({"role": text_role, "content": text_column(record, name)},)
    if not isinstance(value, list):
        raise DataError(
            f"{record.where}: column '{name}' must be a string or a list of messages, not {type_name(value)}"
        )
    return messages_column(record, name)


def messages_column(record: Record, name: str) -> tuple[Message, ...]:
    """Return a column that holds a list of messages, keyed role/content (OpenAI) or from/value (ShareGPT)."""
    value = column(record, name)
    if not isinstance(value, list):
        raise DataError(f"{record.where}: column '{name}' must be a list of messages, not {type_name(value)}")
    if not value:
        raise DataError(f"{record.where}: column '{name}' is empty")
    messages = tuple(_message(item, f"{record.where}: {name}[{index}]") for index, item in enumerate(value))
    if any(message["role"] == "system" for message in messages[1:]):
        raise DataError(f"{record.where}: column '{name}': only the first message may be the system's")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise DataError(f"{where} must be a message, not {type_name(item)}")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    for key in (role_key, content_key):
        if key not in item:
            raise DataError(f"{where}: '{key}' missing")
        if not isinstance(item[key], str):
            raise DataError(f"{where}: '{key}' must be a string, not {type_name(item[key])}")
    if item[role_key] not in ROLES:
        raise DataError(f"{where}: unknown role '{item[role_key]}' (known: {', '.join(ROLES)})")
    if not item[content_key].strip():
        raise DataError(f"{where}: '{content_key}' is empty")
    return {"role": ROLES[item[role_key]], "content": item[content_key]}
