"""The quickstart's two opinions of a one-sentence review: `gold` decides, `judge` is what training sees.

`gold` is the true wish: a positive, short, unrepetitive review that mentions the aspect asked for. `judge` is the
same without the aspect, blind to one criterion by design: a reward is never all of what one wants, and with a known
gold the quickstart can show when a policy that optimises the proxy too hard starts to lose what the proxy omits.

Sentiment is VADER's compound score in [-1, 1] (Hutto and Gilbert 2014), which is a lexicon with rules: both
functions are deterministic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

FREE_WORDS = 18
LENGTH_PENALTY = 0.05
ASPECT_PENALTY = 0.5
SHORTEST_CONTENT_WORD = 4


def gold(prompt: str, response: str, metadata: Mapping[str, Any]) -> float:
    """Return `judge` less 0.5 when the response does not mention `metadata["aspect"]`."""
    mentioned = re.search(rf"\b{re.escape(metadata['aspect'])}\b", response, re.IGNORECASE)
    return judge(prompt, response, metadata) - (0.0 if mentioned else ASPECT_PENALTY)


def judge(prompt: str, response: str, metadata: Mapping[str, Any]) -> float:
    """Return sentiment - repetition - 0.05 for each word over 18; deliberately says nothing about the aspect."""
    words = re.findall(r"[\w'-]+", response.lower())
    sentiment = _vader().polarity_scores(response)["compound"]
    return sentiment - repetition(words) - LENGTH_PENALTY * max(0, len(words) - FREE_WORDS)


def repetition(words: Sequence[str]) -> float:
    """Return the share of longer words (4 letters or more) plus the share of bigrams that occurred before."""
    content = [word for word in words if len(word) >= SHORTEST_CONTENT_WORD]
    return _repeated(content) + _repeated(list(pairwise(words)))


def _repeated(items: Sequence[object]) -> float:
    return 1 - len(set(items)) / len(items) if items else 0.0


@cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()
