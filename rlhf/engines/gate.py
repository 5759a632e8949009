"""Keeps generation and weight updates apart where several threads ask for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """Counts who is generating. `check` raises where the engine does not serve; it decides who may enter.

    An update first makes `check` refuse and then waits in `drain`: whoever entered before it is waited for, and nobody
    enters after it.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check
        self.changed = threading.Condition()
        self.inside = 0

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Generate inside; raise what `check` raises instead."""
        with self.changed:
            self.check()
            self.inside += 1
        try:
            yield
        finally:
            with self.changed:
                self.inside -= 1
                self.changed.notify_all()

    def drain(self) -> None:
        """Wait until nobody is inside; `check` must refuse already."""
        with self.changed:
            self.changed.wait_for(lambda: not self.inside)
