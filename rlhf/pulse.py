"""How far the work of this process has come: a count that grows with it, for who waits for it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rlhf.activity import activity


@dataclass
class Pulse:
    """What a process tells of its progress.

    `beats` grows with each part of the work that is done (a micro-batch, a tensor, a file); `doing` names the work.
    """

    beats: int = 0
    doing: str = ""
    silent: int = 0
    active: tuple[int, ...] = ()

    def beat(self) -> None:
        """Count one more part as done."""
        self.beats += 1

    def begin(self, doing: str) -> None:
        """Name the work that begins."""
        self.doing = doing
        self.beats += 1

    @contextmanager
    def within_library(self, doing: str) -> Iterator[None]:
        """Let a library work that tells nothing of its progress: the bytes that move count as progress meanwhile."""
        self.begin(doing)
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1
            self.beats += 1

    def sampled(self) -> tuple[int, str]:
        """Return the count and the work. Within a library the count grows where bytes have moved since the last call.

        One thread at a time may call this.
        """
        if self.silent:
            before, self.active = self.active, activity()
            self.beats += self.active != before
        return self.beats, self.doing


PULSE = Pulse()
"""That of this process."""
