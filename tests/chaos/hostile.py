"""Hands the product models, states, data, recipes, text and servers that mean harm, and counts what got through.

Every attempt has a folder of its own and a marker that appears when anything of it is executed. What it may do is to
be refused with an error for people, or to be harmless; `escaped` counts what was shown unescaped, read from or
written to outside of its folder, or taken though it must be refused.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlhf.errors import RlhfError
from rlhf.models.tiny import build_tiny
from tests.chaos import _hostile_models, _hostile_sizes, _hostile_text
from tests.chaos._hostile_models import Attempt, Place
from tests.chaos.corruption import Heard
from tests.chaos.row import Row, only

COUNT = 260
LONGEST_S = 10.0
ATTEMPTS: tuple[Attempt, ...] = (
    *_hostile_models.ATTEMPTS,
    *_hostile_text.ATTEMPTS,
    *_hostile_sizes.ATTEMPTS,
)


def run(count: int, rng: random.Random, attempts: Sequence[Attempt] = ATTEMPTS) -> Row:
    """Make `count` attempts, the kinds in turn."""
    counts: Counter[str] = Counter(attempts=count, executed=0, escaped=0, tracebacks=0, hangs=0, refused=0, harmless=0)
    with Heard(), tempfile.TemporaryDirectory() as name:
        tiny = build_tiny(Path(name) / "tiny")
        for number in range(count):
            folder = Path(name) / f"attempt-{number}"
            folder.mkdir()
            place = Place(folder, Path(name) / f"ran-{number}", tiny, rng)
            attempt = attempts[number % len(attempts)]
            began = time.monotonic()
            verdict = _verdict(attempt, place)
            counts[verdict] += 1
            counts["executed"] += place.marker.exists()
            counts["hangs"] += time.monotonic() - began > LONGEST_S
    bad = sum(counts[what] for what in ("executed", "escaped", "tracebacks", "hangs"))
    return Row("hostile models, states, data and text", "0 executed, 0 escaped", dict(counts), not bad)


def _verdict(attempt: Attempt, place: Place) -> str:
    try:
        escaped = attempt(place)
    except RlhfError:
        return "refused"
    except Exception as error:
        print(f"{attempt.__name__}: {type(error).__name__}: {error}")
        return "tracebacks"
    for what in escaped:
        print(f"{attempt.__name__}: {what}")
    return "escaped" if escaped else "harmless"


if __name__ == "__main__":
    only(run, COUNT)
