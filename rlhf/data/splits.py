"""Which rows are held out. Rows that are alike, told by digests of 16 bytes, are all on one side."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable

import numpy as np

Digests = np.ndarray
"""`[rows, 2]` uint64, made by `digest_array` or read from a file."""


def digest_array(digests: Iterable[bytes]) -> Digests:
    """Return digests of 16 bytes as numbers."""
    joined = bytearray()
    for one in digests:
        joined += one
    return np.frombuffer(joined, np.uint64).reshape(-1, 2)


def group_numbers(digests: Digests) -> np.ndarray:
    """Return the number of each row's group, from 0 in the order in which groups begin."""
    rows = len(digests)
    if not rows:
        return np.zeros(0, np.int64)
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ranked = digests[order]
    begins = np.concatenate(([True], (ranked[1:] != ranked[:-1]).any(1)))
    firsts = order[begins]  # the sort is stable
    names = np.empty(len(firsts), np.int64)
    names[np.argsort(firsts)] = np.arange(len(firsts))
    numbers = np.empty(rows, np.int64)
    numbers[order] = names[np.cumsum(begins) - 1]
    return numbers


def shuffled(groups: int, generator: random.Random) -> list[int]:
    """Return `0 .. groups - 1` in the order into which the generator shuffles a list of as many."""
    order = list(range(groups))
    generator.shuffle(order)
    return order


def by_group(digests: Digests, fraction: float, generator: random.Random) -> tuple[array[int], array[int]]:
    """Return the rows to train on and those of a random `fraction` of the groups, held out, both in order."""
    numbers = group_numbers(digests)
    groups = int(numbers.max(initial=-1)) + 1
    return sides(numbers, shuffled(groups, generator)[: round(groups * fraction)])


def by_count(digests: Digests, wanted: int, generator: random.Random) -> tuple[array[int], array[int]]:
    """Return the rows to train on and `wanted` rows or fewer held out, in whole random groups, both in order."""
    numbers = group_numbers(digests)
    sizes = np.bincount(numbers).tolist()
    taken, rows = [], 0
    for group in shuffled(len(sizes), generator):
        if rows + sizes[group] <= wanted:
            taken.append(group)
            rows += sizes[group]
    return sides(numbers, taken)


def sides(numbers: np.ndarray, held: list[int]) -> tuple[array[int], array[int]]:
    """Return the rows whose group is not among `held`, and those whose group is."""
    apart = np.zeros(int(numbers.max(initial=-1)) + 1, bool)
    apart[held] = True
    mask = apart[numbers]
    return places(~mask), places(mask)


def places(mask: np.ndarray) -> array[int]:
    """Return where a mask is True."""
    return array("q", np.flatnonzero(mask).astype(np.int64).tobytes())
