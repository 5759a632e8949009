"""Which instruction a new one is most like, by ROUGE-L, among many that are never compared with it.

A longest common subsequence is at most as long as the words that two texts share, each counted as often as both have
it. An index from words to instructions gives that number for all instructions at once, and only those whose bound
reaches the best similarity found so far are compared. The result equals that of comparing all.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from rlhf.stages.instructions import rouge_l, words

ROUNDING = 1e-9
"""A bound and a similarity are computed in two ways, and are compared with this room between them."""

Occurrence = tuple[str, int]
"""A word and how many of the same stand before it in its text."""


@dataclass(frozen=True)
class Neighbour:
    """The instruction of a pool that another one is most like, by ROUGE-L."""

    name: str
    similarity: float


class Pool:
    """Instructions by name, among which no two should be alike. It grows, and nothing in it changes."""

    def __init__(self, items: Iterable[tuple[str, str]] = ()) -> None:
        self.names: list[str] = []
        self.words: list[list[str]] = []
        self.lengths = array("q")
        self.places: dict[Occurrence, array[int]] = {}
        self.exact: set[str] = set()
        for name, text in items:
            self.add(name, text)

    def add(self, name: str, text: str) -> None:
        """Take one in."""
        found = words(text)
        for occurrence in _occurrences(found):
            self.places.setdefault(occurrence, array("q")).append(len(self.names))
        self.names.append(name)
        self.words.append(found)
        self.lengths.append(len(found))
        self.exact.add(" ".join(found))

    def nearest(self, text: str) -> Neighbour:
        """Return the one that a text is most like, the first of equals; the pool is not empty."""
        said = words(text)
        bounds = self._bounds(said)
        first = int(bounds.argmax())
        best, place = rouge_l(said, self.words[first]), first
        candidates = np.flatnonzero(bounds >= best - ROUNDING)
        for other in candidates[np.argsort(-bounds[candidates], kind="stable")].tolist():
            if bounds[other] < best - ROUNDING:
                break
            similarity = rouge_l(said, self.words[other])
            if similarity > best or (similarity == best and other < place):
                best, place = similarity, other
        return Neighbour(self.names[place], best)

    def __contains__(self, text: str) -> bool:
        """Return whether a text is in the pool, ignoring case, punctuation and spaces."""
        return " ".join(words(text)) in self.exact

    def _bounds(self, said: Sequence[str]) -> NDArray[np.float64]:
        """Return the most that the similarity to each instruction can be."""
        lists = [self.places[occurrence] for occurrence in _occurrences(said) if occurrence in self.places]
        shared = np.zeros(len(self.names), np.int64)
        for places in lists:  # an instruction is at most once in each
            shared[np.frombuffer(places, np.int64)] += 1
        total = np.frombuffer(self.lengths, np.int64) + len(said)
        return np.where(total > 0, 2 * shared / np.maximum(total, 1), 1.0)


class Candidates:
    """What is kept already and what may be kept too, in that order, as one pool; only the second part grows here."""

    def __init__(self, kept: Pool) -> None:
        self.kept = kept
        self.new = Pool()

    def add(self, name: str, text: str) -> None:
        """Take in one that may be kept."""
        self.new.add(name, text)

    def similarity(self, text: str) -> float:
        """Return how like a text is to the one that it is most like."""
        return max(pool.nearest(text).similarity for pool in (self.kept, self.new) if pool.names)

    def __contains__(self, text: str) -> bool:
        """Return whether a text is in the pool, ignoring case, punctuation and spaces."""
        return text in self.kept or text in self.new


def _occurrences(said: Sequence[str]) -> Iterable[Occurrence]:
    """Yield each word with its number among equal ones."""
    return chain.from_iterable(((word, k) for k in range(count)) for word, count in Counter(said).items())
