"""Texts with a label, from rows to batches: which classes there are, and which rows are held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.data.collate import collate
from rlhf.data.rows import TextRow
from rlhf.data.sequences import TokenSequence
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
    """The labels of a source, row by row as they are read; their names in order are the classes."""

    def __init__(self) -> None:
        self.first: dict[str | int, TextRow] = {}
        self.given: list[str | int] = []

    def add(self, row: TextRow) -> None:
        """Take a row's label; DataError where labels are names and numbers mixed."""
        known = next(iter(self.first.values()), row)
        if type(known.label) is not type(row.label):
            raise DataError(
                f"{row.where}: label {row.label!r} is {_kind(row.label)}, but {known.label!r} of {known.where} is"
                f" {_kind(known.label)}; write all labels alike"
            )
        self.first.setdefault(row.label, row)
        self.given.append(row.label)

    def classes(self) -> list[str | int]:
        """Return the labels that there are, sorted, those that are numbers by value; DataError with less than two."""
        if len(self.first) == 1:
            ((label, row),) = self.first.items()
            place = row.where.rpartition(":")[0]
            raise DataError(f"{place}: all {len(self.given)} rows have the label {label!r}; a classifier needs two")
        numbers = all(str(label).removeprefix("-").isdecimal() for label in self.first)
        return sorted(self.first, key=lambda label: (int(label) if numbers else 0, str(label)))


def split_classes(
    labels: Sequence[str | int], texts: Sequence[bytes], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Return the rows to train on and those held out, in order: `fraction` of every class, one text of it at least.

    Rows with the same text (told by a digest) and label stay on one side. ValueError names a label with too few
    texts to be on both sides.
    """
    if not fraction:
        return list(range(len(labels))), []
    classes: dict[str | int, dict[bytes, list[int]]] = {}
    for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
        classes.setdefault(label, {}).setdefault(text, []).append(row)
    heldout: set[int] = set()
    for label, groups in classes.items():
        cut = max(1, round(fraction * len(groups)))
        if cut >= len(groups):
            raise ValueError(f"{label!r} has {len(groups)} different texts, of which {cut} would be held out")
        order = list(groups.values())
        random.Random(f"{seed}/{label}").shuffle(order)
        heldout.update(row for group in order[:cut] for row in group)
    return [row for row in range(len(labels)) if row not in heldout], sorted(heldout)


def _kind(label: str | int) -> str:
    return "a name" if isinstance(label, str) else "a number"
