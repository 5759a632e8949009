"""Rewards that a tiny random model over bytes can learn in seconds: letters from the first half of the alphabet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LIKED = frozenset("abcdefghijklmnop")
EMPTY_PENALTY = 0.1


def gold(prompt: str, response: str, metadata: Mapping[str, Any]) -> float:
    """Return the share of the response's characters in `a` to `p`; an empty response gets -0.1."""
    return judge(prompt, response, metadata) if response else -EMPTY_PENALTY


def judge(prompt: str, response: str, metadata: Mapping[str, Any]) -> float:
    """Return the share of the response's characters in `a` to `p`; it does not mind an empty one (0)."""
    return sum(character in LIKED for character in response) / max(len(response), 1)
