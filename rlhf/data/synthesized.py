"""The chats that a synthesize stage writes, and what it wrote that was not good enough. `sft` reads the chats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from rlhf.data.lines import each_line
from rlhf.recipe.base import PathData

CHATS, REJECTED = "data.jsonl", "rejected.jsonl"


@dataclass(frozen=True)
class Turn:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Chat:
    """A new instruction and its answer, both by the model, and where they come from.

    `examples` are the tasks that the model was shown (`seed-3`, or the id of an earlier chat); the instruction is like
    `nearest` by ROUGE-L `similarity` and like no other more; `score` is the judge's, where there is one.
    """

    id: str
    messages: tuple[Turn, ...]
    examples: tuple[str, ...]
    nearest: str
    similarity: float
    instruction_seed: int
    answer_seed: int
    score: float | None

    @property
    def instruction(self) -> str:
        """What is asked."""
        return self.messages[0].content


@dataclass(frozen=True)
class Rejected:
    """Something the model wrote that is not among the chats, and why; `text` is as it was drawn."""

    reason: str
    text: str
    instruction: str
    examples: tuple[str, ...]
    seed: int


_CHAT, _REJECTED = TypeAdapter(Chat), TypeAdapter(Rejected)


def each_chat(folder: Path) -> Iterator[Chat]:
    """Yield the chats of a synthesize stage; DataError names the file and line of damage."""
    return each_line(folder / CHATS, _CHAT)


def each_rejected(folder: Path) -> Iterator[Rejected]:
    """Yield what a synthesize stage rejected; DataError names the file and line of damage."""
    return each_line(folder / REJECTED, _REJECTED)


def read_synthesized(folder: Path) -> tuple[list[Chat], list[Rejected]]:
    """Return all that a synthesize stage wrote: the chats, and what it rejected."""
    return list(each_chat(folder)), list(each_rejected(folder))


def synthesized_source(folder: Path) -> PathData:
    """Return the chats as a source of rows to imitate."""
    return PathData(path=folder / CHATS, format="messages")
