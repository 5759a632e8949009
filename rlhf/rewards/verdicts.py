"""Verdicts that have been given before, kept in the user's cache: the same question is never paid for twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from rlhf.errors import TrainingError

Verdict = float | None
"""The first response's share of the win, 0 to 1; None when the answer could not be read."""

TABLE = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, first_wins REAL) WITHOUT ROWID"


def verdict_key(model: str, question: str) -> str:
    """Return the sha256 of a model's identity and a question's text: criteria, prompt and both answers in order."""
    return hashlib.sha256(json.dumps([model, question]).encode()).hexdigest()


class VerdictCache:
    """A file of verdicts by key; runs at the same time may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, keys: Sequence[str]) -> dict[str, Verdict]:
        """Return what is known of `keys`."""
        with self._open() as table:
            rows = (table.execute("SELECT key, first_wins FROM verdicts WHERE key = ?", (key,)) for key in keys)
            return {key: verdict for row in rows for key, verdict in row}

    def keep(self, verdicts: Mapping[str, Verdict]) -> None:
        """Add verdicts; those that are there already stay."""
        with self._open() as table, table:
            table.executemany("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", verdicts.items())

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
