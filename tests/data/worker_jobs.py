"""Work for other processes, which import nothing but this."""

import os

from rlhf.errors import DataError


def where(rows: list[int], bad: int) -> list[tuple[int, int]]:
    """Return each row and the process that worked on it; DataError at a bad one."""
    if bad in rows:
        raise DataError(f"row {bad}")
    return [(row, os.getpid()) for row in rows]


def killed(rows: list[int]) -> None:
    """End the process at row 70."""
    if 70 in rows:
        os._exit(1)


def broken(rows: list[int]) -> int:
    """Raise what nobody expects at row 70."""
    return 1 // (70 not in rows)
