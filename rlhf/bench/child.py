"""A process of its own for what is measured without Ray: with the allocator and threads that a role's process has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Self, TypeVar

from rlhf.errors import LostProcess

T = TypeVar("T")


class Child:
    """Runs functions in another process, started with more environment; another one after it died."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.pool = self._pool()

    def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return what the function returns, or raise what it raises; LostProcess when the process died."""
        try:
            with _environment(self.environment):
                pending = self.pool.submit(work, *arguments)
            return pending.result()
        except BrokenProcessPool:
            self.pool.shutdown()
            self.pool = self._pool()
            raise LostProcess("the process that measured it was ended, perhaps for want of memory") from None

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
