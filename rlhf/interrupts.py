"""SIGINT and SIGTERM: the first waits for the end of a step where one is going on, a second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
COMMAND = threading.Event()
"""Set where this process is a command of ours, which may end it at once; a process that imports us is its user's."""


class Interrupted(BaseException):
    """A signal ends the run; `exit_code` is what the process returns, and the text says where the run goes on."""

    def __init__(self, number: int, said: str = "") -> None:
        super().__init__(said)
        self.number = number
        self.exit_code = 128 + number


class Interrupts:
    """Takes the signals while it is entered; in another than the main thread it does nothing.

    Where the work is `deferred`, the first signal is only noted (`wanted`) and `say` tells people so; who defers asks
    `check` where it can stop. Anywhere else, and from the second signal on, Interrupted is raised at once.
    """

    def __init__(self, say: Callable[[str], None] = lambda _: None) -> None:
        self.say = say
        self.wanted: int | None = None
        self.deferring = False
        self.raised = False
        self.before: dict[int, Any] = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the first signal wait inside for `check`, which also comes at the end."""
        self.deferring = True
        try:
            yield
        finally:
            self.deferring = False
        self.check()

    def check(self, said: str = "") -> None:
        """Raise Interrupted where a signal has come."""
        if self.wanted is not None:
            raise Interrupted(self.wanted, said)

    def __enter__(self) -> Self:
        """Begin to take the signals."""
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the signals to who had them; whatever an interrupt has become on its way out is one again."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.raised and self.wanted and error is not None and not isinstance(error, Interrupted):
            raise Interrupted(self.wanted) from error  # Ray's compiled code turns it into a SystemError

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.deferring and self.wanted is None:
            self.wanted = number
            self.say("interrupted: this step is finished and saved first; once more ends at once")
            return
        self.wanted, self.raised = number, True
        raise Interrupted(number)
