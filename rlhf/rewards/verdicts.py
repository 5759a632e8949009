"""Verdicts that have been given before, kept in the user's cache: the same question is never paid for twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import TrainingError
from rlhf.rewards.question import VERSION

Verdict = float | None
"""The first response's share of the win, 0 to 1; None when the answer could not be read."""

TABLE = "CREATE TABLE IF NOT EXISTS readable_verdicts (key TEXT PRIMARY KEY, first_wins REAL NOT NULL) WITHOUT ROWID"
"""Older versions kept verdicts under keys that left out the endpoint, in a table of another name."""


def verdict_key(model: str, conditions: Mapping[str, Any], question: str) -> str:
    """Return the sha256 of all that a verdict depends on.

    That is the model's identity, the judge's `conditions` (where it is asked, and how its answer is drawn), the version
    of the question, and its text: criteria, prompt and both answers in order.
    """
    content = [VERSION, model, dict(conditions), question]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class VerdictCache:
    """A file of verdicts by key; runs at the same time may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, keys: Sequence[str]) -> dict[str, float]:
        """Return what is known of `keys`."""
        with self._open() as table:
            rows = (
                table.execute("SELECT key, first_wins FROM readable_verdicts WHERE key = ?", (key,)) for key in keys
            )
            return {key: verdict for row in rows for key, verdict in row}

    def keep(self, verdicts: Mapping[str, Verdict]) -> None:
        """Add verdicts; those that are there already stay, and what could not be read is not kept: it is asked again."""
        readable = [(key, verdict) for key, verdict in verdicts.items() if verdict is not None and 0 <= verdict <= 1]
        with self._open() as table, table:
            table.executemany("INSERT OR IGNORE INTO readable_verdicts VALUES (?, ?)", readable)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as table:
                table.execute(TABLE)
                yield table
        except sqlite3.Error as error:
            raise TrainingError(
                f"{self.path}: the cache of the judge's verdicts cannot be used: {error}; remove it, or set RLHF_CACHE"
                " to another folder"
            ) from error
