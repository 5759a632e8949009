"""The chats that a synthesize stage writes, and what it wrote that was not good enough. `sft` reads the chats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from rlhf.data.lines import read_lines, write_lines
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


def write_synthesized(folder: Path, chats: Sequence[Chat], rejected: Sequence[Rejected]) -> None:
    """Write `data.jsonl` and `rejected.jsonl`."""
    write_lines(folder / CHATS, chats)
    write_lines(folder / REJECTED, rejected)


def read_synthesized(folder: Path) -> tuple[list[Chat], list[Rejected]]:
    """Read what `write_synthesized` wrote; DataError names the file and line of damage."""
    return read_lines(folder / CHATS, _CHAT), read_lines(folder / REJECTED, _REJECTED)


def synthesized_source(folder: Path) -> PathData:
    """Return the chats as a source of rows to imitate."""
    return PathData(path=folder / CHATS, format="messages")
