"""Durations and sizes as people read them."""

from __future__ import annotations

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def duration(seconds: float) -> str:
    """Write seconds in the largest unit that fits: 45 s, 12 min, 3.4 h."""
    for length, unit in UNITS:
        if seconds >= length:
            amount = seconds / length
            return f"{amount:.{1 if amount < 10 and length > 60 else 0}f} {unit}"
    return "0 s"


def size(count: float) -> str:
    """Write bytes in the largest unit that fits: 812 B, 4.2 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
