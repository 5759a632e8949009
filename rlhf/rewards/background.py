"""Work whose result comes later, as a `Pending`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Run work in a thread of its own, which never keeps the process alive, and return its result to come."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def in_background(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in a thread and an event loop of its own."""
    return in_thread(partial(asyncio.run, work))
