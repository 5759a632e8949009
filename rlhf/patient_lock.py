"""A lock between processes whose holder may work for long: whoever waits says so, and Ctrl-C ends the wait."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from rlhf.untrusted import echo, printable

log = logging.getLogger("rlhf")
LONGEST = 200
FIRST_S, SAY_S = 1.0, 30.0
"""A wait is told after so long, and then again that often."""


def tell(message: str) -> None:
    """Log a message and write it to the error stream, where people see it also before a run has its display."""
    log.info(message)
    with suppress(OSError):
        echo(message, err=True)


@contextmanager
def held(path: Path, doing: str, say: Callable[[str], None] = tell) -> Iterator[None]:
    """Hold the lock `path` for this process alone; `doing` tells others that wait what this process does with it.

    The wait has no end of its own while the holder lives, as nobody knows how long its work takes; the lock of a
    process that has died is free, as the system sees to that.
    """
    lock, note = FileLock(path), path.with_name(f"{path.name}.holder")
    began = time.monotonic()
    wait_s = FIRST_S
    while True:
        try:
            lock.acquire(timeout=wait_s)
            break
        except Timeout:
            waited = time.monotonic() - began
            say(f"{_holder(note)} is {doing}; waiting for it, {waited:.0f} s so far (Ctrl-C ends this)")
            wait_s = SAY_S
    try:
        _sign(note)
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _sign(note: Path) -> None:
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):
        note.write_text(json.dumps(about), encoding="utf-8")


def _holder(note: Path) -> str:
    try:
        about = json.loads(note.read_text(encoding="utf-8"))
        named = f"pid {int(about['pid'])} on {about['host']}, since {about['since']}"
        return f"another process ({printable(named, LONGEST)})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
