"""The other end of `FunctionProcess`: imports a function of the user's and calls it, in a process of its own.

Run as a program, `user_function.py file.py:name SOCKET LIFELINE`; it imports the standard library alone, so that it
starts in a few hundredths of a second. Over the socket go lines of JSON: first `{"line": of the function}` or
`{"unusable": why}`, then for each `{"prompt", "response", "metadata"}` either `{"score": number}` or
`{"failure": what, "line": n, "trace": text}`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

RewardFunction = Callable[[str, str, Mapping[str, Any]], float]
FLOAT32_MAX = 3.4028234663852886e38


class UnusableError(Exception):
    """There is no such function; the message says what is wrong with the file, and where."""


def load_function(path: str) -> RewardFunction:
    """Import `file.py:name` here and return the function; UnusableError when there is none."""
    file, _, name = path.rpartition(":")
    if not Path(file).is_file():
        raise UnusableError(f"{file}: no such file (a reward function is given as file.py:function)")
    function = getattr(_import(Path(file)), name, None)
    if function is None:
        raise UnusableError(f"{file}: has no function '{name}'")
    if not callable(function):
        raise UnusableError(f"{file}: '{name}' is not a function but {function!r:.80}")
    return function


def answer(function: RewardFunction, file: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Call the function and return what to say: a finite score, or what it did instead and in which line."""
    try:
        value = function(request["prompt"], request["response"], request["metadata"])
        number = float(value) if isinstance(value, Real) and math.isfinite(value) else math.nan
        if abs(number) <= FLOAT32_MAX:
            return {"score": number}
        wanted = "a finite number" if math.isnan(number) else "a number that float32 holds"
        return {"failure": f"returned {value!r:.80}, not {wanted}", "line": _first_line(function), "trace": ""}
    except (Exception, SystemExit) as error:
        line = _line_in(file, error) or _first_line(function)
        return {"failure": f"raised {_describe(error)}", "line": line, "trace": traceback.format_exc()}


def _import(file: Path) -> ModuleType:
    resolved = file.resolve()
    name = f"rlhf_reward_{file.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise UnusableError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UnusableError(f"{file}:{_line_in(file, error) or 1}: cannot be imported: {_describe(error)}") from error
    return module


def _line_in(file: Path, error: BaseException) -> int | None:
    """Return the innermost line of `file` that the error passed through, or that cannot be parsed."""
    resolved = file.resolve()
    if isinstance(error, SyntaxError) and error.filename == str(resolved):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == resolved]
    return lines[-1] if lines else None


def _first_line(function: RewardFunction) -> int:
    code = getattr(function, "__code__", None)
    return code.co_firstlineno if code else 1


def _describe(error: BaseException) -> str:
    said = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _die_with_parent(lifeline: int) -> None:
    """Have the kernel kill this process and its children when the parent, which holds the pipe's other end, is gone.

    It needs no thread of Python's: a function may hold the interpreter for ever, as a regular expression can.
    """
    os.set_blocking(lifeline, False)
    if hasattr(fcntl, "F_SETSIG"):  # Linux; elsewhere the end of the socket tells, between two calls
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):
        if not os.read(lifeline, 1):  # it had ended before
            sys.exit(1)


def _serve(path: str, connection: socket.socket) -> None:
    lines = connection.makefile("rb")
    file = Path(path.rpartition(":")[0]).resolve()

    def say(message: Mapping[str, Any]) -> None:
        connection.sendall(json.dumps(message).encode() + b"\n")

    try:
        function = load_function(path)
    except UnusableError as error:
        say({"unusable": str(error)})
        return
    say({"line": _first_line(function)})
    for line in lines:
        say(answer(function, file, json.loads(line)))


if __name__ == "__main__":
    for inherited in sys.argv[2:]:
        os.set_inheritable(int(inherited), False)
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # "where are you?", from who has waited too long
    _die_with_parent(int(sys.argv[3]))
    _serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
