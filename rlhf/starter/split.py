"""Cuts data into what is trained on, the prompts that are answered while training, and prompts held out to compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.reading import (
    Purpose,
    read_conversations,
    read_labelled,
    read_preferences,
    read_prompts,
)
from rlhf.data.rows import Message
from rlhf.recipe.base import PathData
from rlhf.seeding import derive

SHARE, MOST = 0.1, 200
"""Of the prompts, how many are held out."""
SEED = 17


@dataclass(frozen=True)
class Item:
    """A row as it is written again, the chat that it answers, and other columns of a prompt."""

    row: Mapping[str, Any]
    prompt: Sequence[Message]
    metadata: Mapping[str, Any]

    @property
    def texts(self) -> set[str]:
        """By what comparisons tell whether a prompt was seen: all that the user says."""
        return {message["content"] for message in self.prompt if message["role"] == "user"}


@dataclass(frozen=True)
class Split:
    """Rows to train on, and prompts; no held-out prompt is among the others."""

    train: list[Mapping[str, Any]]
    prompts: list[Mapping[str, Any]]
    heldout: list[Mapping[str, Any]]


def read_items(path: Path, purpose: Purpose) -> list[Item]:
    """Read all rows of a file; DataError at the first bad one."""
    source = PathData(path=path)
    if purpose == "conversations":
        return [Item({"messages": list(row.messages)}, _asked(row.messages), {}) for row in read_conversations(source)]
    if purpose == "prompts":
        return [Item({}, row.messages, row.metadata) for row in read_prompts(source)]
    if purpose == "labelled":
        answers = [answer for row in read_labelled(source) for answer in row]
        return [
            Item({"prompt": list(a.prompt), "completion": a.completion, "label": a.desirable}, a.prompt, {})
            for a in answers
        ]
    return [
        Item({"prompt": list(row.prompt), "chosen": row.chosen, "rejected": row.rejected}, row.prompt, {})
        for row in read_preferences(source)
    ]


def split(items: Sequence[Item]) -> Split:
    """Hold out a tenth of the prompts, 200 at most and one at least, the same ones each time."""
    by_text = {item.prompt[-1]["content"]: item for item in items}
    ranked = sorted(by_text, key=lambda text: derive(SEED, "heldout", text))
    held = set(ranked[: max(1, min(MOST, round(SHARE * len(ranked))))])
    kept = [item for item in items if not item.texts & held]
    return Split(
        [item.row for item in kept], _prompts(kept), _prompts(by_text[text] for text in ranked if text in held)
    )


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _prompts(items: Iterable[Item]) -> list[Mapping[str, Any]]:
    """Return a row for each different prompt, numbered."""
    unique = {item.prompt[-1]["content"]: item for item in items}
    return [
        {**item.metadata, "id": str(number), "prompt": list(item.prompt)}
        for number, item in enumerate(unique.values(), start=1)
    ]


def _asked(messages: Sequence[Message]) -> Sequence[Message]:
    """Return a chat up to its last turn of the user."""
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    return messages[: last + 1]
