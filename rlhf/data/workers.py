"""Work on many rows in processes of their own, one a core, with results in the order of the rows.

A process is a fresh Python that imports what the work needs and nothing of the program that started it, so a script
without a `__main__` guard is not run again. It ends when its connection does: when the caller is done, fails, is
interrupted or killed. Little work is done in this process, as a start costs some seconds.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from rlhf.errors import DataError, ResourceError, RlhfError

Row = TypeVar("Row")
Result = TypeVar("Result")

CHARACTERS = 1 << 17
"""Of text in one part of the work: some ten thousand tokens."""

HERE = 32
"""Parts that are done in this process before others are started for the rest: some seconds of work."""

MOST, AHEAD = 16, 4
"""Processes, beyond which reading the rows takes as long as the work; and parts for each that may wait for earlier."""


def in_parts(rows: Iterable[Row], size: Callable[[Row], int]) -> Iterator[list[Row]]:
    """Yield rows in parts of about `CHARACTERS`; those before a bad one come before its error."""
    part: list[Row] = []
    characters = 0
    try:
        for row in rows:
            part.append(row)
            characters += size(row)
            if characters >= CHARACTERS:
                yield part
                part, characters = [], 0
    except RlhfError:
        if part:
            yield part
        raise
    if part:
        yield part


def worked(work: Callable[[list[Row]], Result], parts: Iterable[list[Row]]) -> Iterator[Result]:
    """Yield `work` of each part in order; `work` and what it is bound to are sent to processes where there are many.

    The first error in the order of the rows is raised, be it of the parts or of the work on them.
    """
    remaining = iter(parts)
    for _, part in zip(range(HERE), remaining, strict=False):
        yield work(part)
    cores = min(len(os.sched_getaffinity(0)), MOST)
    sent = _pickled(work) if cores > 1 else None
    if sent is None:
        yield from map(work, remaining)
        return
    first = next(remaining, None)
    if first is not None:
        with _processes(cores, sent) as connections:
            yield from _in_order(connections, first, remaining)


def _in_order(connections: Sequence[Connection], first: list[Any], parts: Iterator[list[Any]]) -> Iterator[Any]:
    """Give each idle process a part, and yield the results in the order of the parts."""
    waiting: deque[list[Any]] = deque([first])
    idle, busy = list(connections), dict[Connection, int]()
    done: dict[int, Any] = {}
    given = taken = 0
    failed: RlhfError | None = None
    while True:
        while idle and given - taken < AHEAD * len(connections):
            if not waiting and failed is None:
                try:
                    waiting.extend([part] if (part := next(parts, None)) is not None else [])
                except RlhfError as error:
                    failed = error
            if not waiting:
                break
            connection = idle.pop()
            _give(connection, waiting.popleft())
            busy[connection] = given
            given += 1
        if not busy:
            break
        for ready in wait(list(busy)):
            assert isinstance(ready, Connection)
            done[busy.pop(ready)] = _take(ready)
            idle.append(ready)
        while taken in done:
            yield _result(done.pop(taken))
            taken += 1
    if failed is not None:
        raise failed


def _give(connection: Connection, part: Any) -> None:
    try:
        connection.send(part)
    except OSError as error:
        raise _ended() from error


def _take(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise _ended() from error


def _ended() -> ResourceError:
    return ResourceError(
        "a process that tokenises has ended before its work was done, as the system ends one when memory runs out; free"
        " some memory, or let this run have fewer cores (taskset)"
    )


def _result(answer: tuple[str, Any]) -> Any:
    kind, value = answer
    if kind == "data":
        raise DataError(value)
    if kind == "error":
        raise RuntimeError(f"in a process that tokenises: {value}")
    return value


def _pickled(work: Callable[..., Any]) -> bytes | None:
    """Return the work as it is sent to other processes; None where it cannot be (a slow tokenizer's library)."""
    try:
        return pickle.dumps(work)
    except (pickle.PicklingError, TypeError, AttributeError):
        return None


@contextmanager
def _processes(number: int, work: bytes) -> Iterator[list[Connection]]:
    """Start processes that know the work; they end with the block."""
    with ExitStack() as stack:
        connections = []
        for _ in range(number):
            ours, process = _start()
            stack.callback(process.wait)
            stack.callback(process.kill)
            connections.append(stack.enter_context(closing(ours)))
        for connection in connections:
            try:
                connection.send_bytes(work)
            except OSError as error:
                raise _ended() from error
        yield connections


def _start() -> tuple[Connection, subprocess.Popen[bytes]]:
    ours, theirs = Pipe()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with closing(theirs):
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    return ours, process


def serve(connection: Connection) -> None:
    """Receive the work, then do it on each part that comes, until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this process ends it
    try:
        work = pickle.loads(connection.recv_bytes())
        while True:
            connection.send(_answer(work, connection.recv()))
    except (EOFError, OSError):
        return


def _answer(work: Callable[[Any], Any], part: Any) -> tuple[str, Any]:
    try:
        return "done", work(part)
    except DataError as error:
        return "data", str(error)
    except Exception as error:  # told where it can be seen
        return "error", f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
