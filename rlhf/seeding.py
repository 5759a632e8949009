"""Seeds that depend on what they are for and never on which worker asks, or when."""

from __future__ import annotations

import hashlib


def derive(seed: int, *parts: str | int) -> int:
    """Return a 32-bit seed for a path such as (run seed, stage, step, prompt id, sample index)."""
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
