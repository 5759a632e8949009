"""A circuit breaker: when a service is down, say so at once instead of waiting out a deadline for every batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock

OPENS_AFTER = 3
PAUSE_S = 30.0


class Breaker:
    """Counts the requests in a row that were given up after all their attempts; `OPENS_AFTER` of them open it.

    While it is open nobody asks; after `pause_s` one request may try, once, and its end decides (half-open).
    """

    def __init__(self, pause_s: float = PAUSE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.pause_s = pause_s
        self.clock = clock
        self.lock = Lock()
        self.failures = 0
        self.last = ""
        self.asked_again = 0.0

    def refusal(self) -> str | None:
        """Return why nobody may ask now, or None; in a pause that is over, the one who is let through is the probe."""
        with self.lock:
            if self.failures < OPENS_AFTER:
                return None
            now = self.clock()
            if now >= self.asked_again:
                self.asked_again = now + self.pause_s
                return None
            wait = self.asked_again - now
            return (
                f"{self.last}; not asked, for that was failure {self.failures} in a row: it is left alone for"
                f" {wait:.0f} s more"
            )

    @property
    def probing(self) -> bool:
        """Whether whoever may ask now is a probe, to be given one attempt."""
        return self.failures >= OPENS_AFTER

    def succeeded(self) -> None:
        """Close it."""
        with self.lock:
            self.failures = 0

    def failed(self, what: str) -> None:
        """Count a request whose every attempt failed; `what` is the last one's failure."""
        with self.lock:
            self.failures += 1
            self.last = what
            self.asked_again = self.clock() + self.pause_s
