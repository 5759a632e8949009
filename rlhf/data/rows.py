"""What the data files hold, before tokenisation. `where` is `file:line`, for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]
"""One chat turn: `{"role": "system" | "user" | "assistant" | "tool", "content": text}`."""


@dataclass(frozen=True)
class Conversation:
    """A chat to imitate; the assistant's turns are what is learned."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class PromptRow:
    """A chat that ends with the user's turn; `text` is that turn, `metadata` the file's other columns."""

    id: str
    messages: tuple[Message, ...]
    text: str
    metadata: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class LabelledRow:
    """One answer to the chat `prompt`, good (`desirable`) or bad."""

    prompt: tuple[Message, ...]
    completion: str
    desirable: bool
    where: str


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to the chat `prompt`; `margin` says by how much the chosen one is better (0: unknown)."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float
    where: str


@dataclass(frozen=True)
class TextRow:
    """A text and the class it belongs to, by name or by number."""

    text: str
    label: str | int
    where: str
