"""How often the processes of a role may be replaced in a run."""

from __future__ import annotations

import logging
import threading

from rlhf.errors import LostProcess, TrainingError

log = logging.getLogger("rlhf")


class Restarts:
    """Counts the replacements of one role's processes in a run; `allowed` 0 allows none."""

    def __init__(self, role: str, allowed: int = 0) -> None:
        self.role = role
        self.allowed = allowed
        self.used = 0
        self.lock = threading.Lock()

    def spend(self, error: LostProcess) -> None:
        """Count one more and tell people of it.

        Raises:
            LostProcess: the error itself, where no replacement is allowed at all.
            TrainingError: all have been used up.
        """
        with self.lock:
            if not self.allowed:
                raise error
            if self.used == self.allowed:
                raise TrainingError(
                    f"{error}; {self.role} was restarted {self.used} times before, no more is allowed"
                    " (recovery.restarts)"
                ) from error
            self.used += 1
            log.warning("%s; restarted (%d of %d)", error, self.used, self.allowed)
