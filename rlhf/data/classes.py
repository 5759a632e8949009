"""Texts with a label, from rows to batches: which classes there are, and which rows are held out."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf.data.collate import collate
from rlhf.data.rows import TextRow
from rlhf.data.sequences import TokenSequence
from rlhf.data.splits import Digests, group_numbers, places, shuffled
from rlhf.errors import DataError
from rlhf.types import Sequences, TokenBatch


@dataclass(frozen=True)
class ClassSequence:
    """A text and the number of its class."""

    sequence: TokenSequence
    label: int


@dataclass(frozen=True)
class ClassBatch(Sequences):
    """`B` texts; `labels` `[B]` int64 are the numbers of their classes."""

    batch: TokenBatch
    labels: Tensor


def collate_classes(rows: Sequence[ClassSequence], pad_id: int) -> ClassBatch:
    """Pad the texts, `[B, T]`."""
    return ClassBatch(
        batch=collate([row.sequence for row in rows], pad_id), labels=torch.tensor([row.label for row in rows])
    )


class Labels:
    """The labels of a source, row by row as they are read; what is kept is the first row of each."""

    def __init__(self) -> None:
        self.first: dict[str | int, TextRow] = {}
        self.rows = 0

    def add(self, row: TextRow) -> None:
        """Take a row's label; DataError where labels are names and numbers mixed."""
        known = next(iter(self.first.values()), row)
        if type(known.label) is not type(row.label):
            raise DataError(
                f"{row.where}: label {row.label!r} is {_kind(row.label)}, but {known.label!r} of {known.where} is"
                f" {_kind(known.label)}; write all labels alike"
            )
        self.first.setdefault(row.label, row)
        self.rows += 1

    def classes(self) -> list[str | int]:
        """Return the labels that there are, sorted, those that are numbers by value; DataError with less than two."""
        if len(self.first) == 1:
            ((label, row),) = self.first.items()
            place = row.where.rpartition(":")[0]
            raise DataError(f"{place}: all {self.rows} rows have the label {label!r}; a classifier needs two")
        return in_order(self.first)


def in_order(labels: Iterable[str | int]) -> list[str | int]:
    """Return different labels sorted, those that are numbers by value."""
    found = list(labels)
    numbers = all(str(label).removeprefix("-").isdecimal() for label in found)
    return sorted(found, key=lambda label: (int(label) if numbers else 0, str(label)))


def split_classes(
    labels: Sequence[str | int], numbers: np.ndarray, texts: Digests, fraction: float, seed: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Return the rows to train on and those held out, in order: `fraction` of every class, one text of it at least.

    `numbers` [rows] says which of the labels each row has, and `texts` which rows have the same text: with one label
    they stay on one side. ValueError names a label with too few texts to be on both sides.
    """
    if not fraction:
        return range(len(numbers)), ()
    apart = np.zeros(len(numbers), bool)
    for number in dict.fromkeys(numbers.tolist()):
        rows = np.flatnonzero(numbers == number)
        groups = group_numbers(texts[rows])
        count = int(groups.max()) + 1
        cut = max(1, round(fraction * count))
        if cut >= count:
            raise ValueError(f"{labels[number]!r} has {count} different texts, of which {cut} would be held out")
        held = shuffled(count, random.Random(f"{seed}/{labels[number]}"))[:cut]
        apart[rows[np.isin(groups, held)]] = True
    return places(~apart), places(apart)


def _kind(label: str | int) -> str:
    return "a name" if isinstance(label, str) else "a number"
