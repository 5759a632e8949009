"""PLACEHOLDER, written by `rlhf init`: replace the body of `score` by what you want of an answer.

It labels preference pairs, rewards training or decides comparisons, as the recipe says. It is called once for each
answer, in a process of its own, and must return a number; larger is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score(prompt: str, response: str, metadata: Mapping[str, Any]) -> float:
    """Score an answer; `prompt` is the user's last turn, `metadata` the other columns of the prompt's row."""
    words = response.split()
    asked = {word.lower().strip(".,;:!?") for word in prompt.split() if len(word) > 3}
    said = {word.lower().strip(".,;:!?") for word in words}
    on_topic = len(asked & said) / max(1, len(asked))
    repeated = 1 - len(set(words)) / max(1, len(words))
    return on_topic - repeated
