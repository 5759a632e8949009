"""Tokenised rows, ready to be padded into batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenSequence:
    """One sequence; `response_mask[t]` is True where `tokens[t]` is trained or scored. Both have the same length."""

    tokens: tuple[int, ...]
    response_mask: tuple[bool, ...]


@dataclass(frozen=True)
class TokenPair:
    """Two responses to one prompt; `margin` says by how much the chosen one is better (0: unknown)."""

    chosen: TokenSequence
    rejected: TokenSequence
    margin: float


@dataclass(frozen=True)
class LabelledSequence:
    """One response and whether it is a good one."""

    sequence: TokenSequence
    desirable: bool


def answered(prompt: tuple[int, ...], response: tuple[int, ...]) -> TokenSequence:
    """Return prompt + response, the response marked."""
    return TokenSequence(prompt + response, (False,) * len(prompt) + (True,) * len(response))
