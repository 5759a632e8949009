"""Watches Ray's head: without it Ray ends this process after a minute, with a code and a message of its own."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import psutil

from rlhf.errors import ResourceError

POLL_S = 2.0
PATIENCE_S = 20.0
"""How long the head may be out of reach; Ray gives up after 60 s."""


class HeadWatch:
    """Ends this process when nothing listens at the head's `address` any more; `say` logs the reason first."""

    def __init__(self, address: str, say: Callable[[str], None]) -> None:
        host, _, port = address.rpartition(":")
        self.address = (host, int(port))
        self.say = say
        self.ended = threading.Event()
        threading.Thread(target=self._watch, name="ray-head", daemon=True).start()

    def stop(self) -> None:
        """Watch no more."""
        self.ended.set()

    def _watch(self) -> None:
        seen = time.monotonic()
        while not self.ended.wait(POLL_S):
            if self._answers():
                seen = time.monotonic()
            elif time.monotonic() - seen > PATIENCE_S and not self.ended.is_set():
                self._give_up()

    def _answers(self) -> bool:
        try:
            socket.create_connection(self.address, PATIENCE_S).close()
        except OSError:
            return False
        return True

    def _give_up(self) -> None:
        """End what Ray started here, and this process: every thread may wait for Ray, so none is asked."""
        message = (
            f"Ray's head at {self.address[0]}:{self.address[1]} is gone, and with it every process of this run;"
            " the same command goes on from the last saved state"
        )
        self.say(message)
        sys.stderr.write(f"error: {message}\n")
        for process in psutil.Process().children(recursive=True):
            process.kill()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(ResourceError.exit_code)
