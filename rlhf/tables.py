"""Tables and texts of a terminal in which two different names never look the same, however narrow it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from rich.table import Table

MOST = 60
"""Characters of a value that is shown whole."""
AROUND = 12
"""Characters of what is common to all values that stay beside the part in which they differ."""
DIGEST = 6


class WholeTable(Table):
    """A table whose cells and headings are folded where they do not fit; rich's own end in an ellipsis."""

    def add_column(self, *arguments: Any, **options: Any) -> None:
        """Add a column as rich does; `overflow` is `fold`."""
        super().add_column(*arguments, **{"overflow": "fold", **options})


def told_apart(texts: Sequence[str], most: int = MOST) -> list[str]:
    """Return texts of about `most` characters at most, of which two are equal only where the given ones are.

    Longer ones lose what they have in common at both ends, and what is still too long its middle; where that leaves
    different texts alike, a digest tells them apart.
    """
    if all(len(text) <= most for text in texts):
        return list(texts)
    short = [_middle(text, most) for text in _differing(texts)]
    if len(set(short)) == len(set(texts)):
        return short
    return [f"{text} #{hashlib.sha256(whole.encode('utf-8', 'replace')).hexdigest()[:DIGEST]}"
            for text, whole in zip(short, texts, strict=True)]  # fmt: skip


def _differing(texts: Sequence[str]) -> list[str]:
    """Return the texts without most of what all of them begin and end with."""
    if len(set(texts)) < 2:
        return list(texts)
    start = _alike(texts)
    rests = [text[start:] for text in texts]
    end = _alike([rest[::-1] for rest in rests])
    start, end = max(0, start - AROUND), max(0, end - AROUND)
    return [("…" if start else "") + text[start : len(text) - end] + ("…" if end else "") for text in texts]


def _alike(texts: Sequence[str]) -> int:
    """Return how many characters all texts begin with."""
    return sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False)))


def _middle(text: str, most: int) -> str:
    """Return a text without its middle where it has more than `most` characters."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"
