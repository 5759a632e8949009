"""Sequences whose rows are made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

Row = TypeVar("Row")


class Lazy(Sequence[Row]):
    """`size` rows, of which row i is `make(i)`, made anew each time."""

    def __init__(self, make: Callable[[int], Row], size: int) -> None:
        self.make = make
        self.size = size

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.size

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        """Return the row at an index, or those of a slice."""
        rows = range(self.size)[index]
        return self.make(rows) if isinstance(rows, int) else [self.make(row) for row in rows]
