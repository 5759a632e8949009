"""What a good pseudo-word is, exactly: the gold reward of known_truth.yaml, and the judge that labels its pairs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

LIKED = frozenset("abcdefghijklm")
LONGEST = 12
EMPTY = -1.0


def gold(prompt: str, response: str, metadata: Mapping[str, Any]) -> float:
    """Return the share of letters from a to m, less the share of letters that repeat the one before or the one
    before that, less 0.1 for each character over 12; an empty response gets -1.

    A pseudo-word of the SFT data hardly ever repeats itself, so a reward model trained on samples of that policy cannot
    learn what repetition costs: it knows gold where the data is, and nowhere else.
    """
    if not response:
        return EMPTY
    liked = sum(letter in LIKED for letter in response) / len(response)
    echoes = sum(a == b for a, b in pairwise(response)) + sum(
        a == b for a, b in zip(response, response[2:], strict=False)
    )
    return liked - echoes / len(response) - 0.1 * max(0, len(response) - LONGEST)
