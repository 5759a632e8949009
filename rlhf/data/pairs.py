"""The preference pairs that an annotate stage writes. Token ids travel: the text is never tokenised again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.data.lazy import Lazy
from rlhf.data.lines import each_line, lazy_lines, write_lines
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


def write_pairs(path: Path, pairs: Iterable[Pair]) -> None:
    """Write one pair a line as JSON; floats keep all their bits. ValueError on a score that is not finite."""
    write_lines(path, pairs)


def each_pair(path: Path) -> Iterator[Pair]:
    """Yield the pairs that `write_pairs` or an annotate stage wrote; DataError names the file and line of damage."""
    return each_line(path, _PAIR)


def read_pairs(path: Path) -> list[Pair]:
    """Return all pairs of a file, which have to fit in memory; DataError if there are none."""
    return list(_some(path, list(each_pair(path))))


def lazy_pairs(path: Path) -> Sequence[Pair]:
    """Return the pairs of a finished stage, read from the file on access; DataError if there are none."""
    return _some(path, lazy_lines(path, _PAIR))


def pair_sequences(pairs: Sequence[Pair]) -> Lazy[TokenPair]:
    """Return the pairs as token sequences.

    The margin is 0: a labeller says which response is better, not by how much, and the judge's scores would
    give away which labels noise has flipped.
    """
    return Lazy(lambda place: _sequences(pairs[place]), len(pairs))


def _sequences(pair: Pair) -> TokenPair:
    return TokenPair(
        answered(pair.prompt_tokens, pair.chosen_tokens), answered(pair.prompt_tokens, pair.rejected_tokens), 0.0
    )


def _some(path: Path, pairs: Sequence[Pair]) -> Sequence[Pair]:
    if not pairs:
        raise DataError(f"{path}:1: no pairs")
    return pairs
