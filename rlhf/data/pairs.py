"""The preference pairs that an annotate stage writes. Token ids travel: the text is never tokenised again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.data.lines import read_lines, write_lines
from rlhf.data.sequences import TokenPair, answered
from rlhf.errors import DataError


@dataclass(frozen=True)
class Pair:
    """Two sampled responses and their label.

    `chosen` is the label after noise; `*_score` are the judge's noise-free scores of the response so labelled, so a
    `flipped` pair has `chosen_score <= rejected_score`. `heldout` pairs are kept out of training, for accuracy.
    """

    prompt_id: str
    prompt: str
    prompt_tokens: tuple[int, ...]
    metadata: Mapping[str, Any]
    chosen: str
    chosen_tokens: tuple[int, ...]
    rejected: str
    rejected_tokens: tuple[int, ...]
    chosen_score: float
    rejected_score: float
    flipped: bool
    heldout: bool


_PAIR = TypeAdapter(Pair)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write one pair a line as JSON; floats keep all their bits. ValueError on a score that is not finite."""
    write_lines(path, pairs)


def read_pairs(path: Path) -> list[Pair]:
    """Read what `write_pairs` wrote; DataError names the file and line of damage."""
    pairs = read_lines(path, _PAIR)
    if not pairs:
        raise DataError(f"{path}:1: no pairs")
    return pairs


def pair_sequences(pairs: Sequence[Pair]) -> list[TokenPair]:
    """Return the pairs as token sequences.

    The margin is 0: a labeller says which response is better, not by how much, and the judge's scores would
    give away which labels noise has flipped.
    """
    return [
        TokenPair(
            answered(pair.prompt_tokens, pair.chosen_tokens), answered(pair.prompt_tokens, pair.rejected_tokens), 0.0
        )
        for pair in pairs
    ]
