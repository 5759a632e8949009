"""A process that calls one function of the user's: it may hang, crash or print, and the run goes on or says why not."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from pathlib import Path
from threading import Thread
from typing import IO, Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from rlhf.errors import DataError, RecipeError, TrainingError
from rlhf.rewards import user_function
from rlhf.types import Prompt

log = logging.getLogger("rlhf")
printed_log = log.getChild("printed")
LOADING_S = 120.0
ASKING_S = 0.2
LINE, LINES = 2000, 200


class FunctionProcess:
    """Runs `file.py:name` in a fresh Python with this environment; it dies with this process, however that ends.

    What it prints goes to `logs/rewards.log` of a run. Its children belong to its process group and end with it.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        """Start it and import the file; RecipeError says what is wrong with the file, and where."""
        self.path, self.timeout_s = path, timeout_s
        self.file, _, self.name = path.rpartition(":")
        self.connection, theirs = socket.socketpair()
        lifeline, held = os.pipe()
        program = [sys.executable, "-P", "-u", user_function.__file__, path, str(theirs.fileno()), str(lifeline)]
        with theirs:
            process = subprocess.Popen(
                program,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), lifeline),
                start_new_session=True,
            )
        os.close(lifeline)
        self.process = process
        self.end = weakref.finalize(self, _end, process, self.connection, held)
        assert process.stdout is not None
        self.printed: deque[str] = deque(maxlen=LINES)
        self.printing = Thread(target=_keep, args=(process.stdout, Path(self.file).name, self.printed), daemon=True)
        self.printing.start()
        self.answers = self.connection.makefile("rb")
        self._load()

    def score(self, prompt: Prompt, response: str) -> float:
        """Return the function's finite score of a response.

        TrainingError when it raises, returns anything else, ends the process, or takes longer than `timeout_s`. Of the
        metadata, what JSON has no form for arrives as text (dates) or is a DataError.
        """
        try:
            body = {"prompt": prompt.text, "response": response, "metadata": dict(prompt.metadata)}
            request = json.dumps(body, default=to_jsonable_python).encode() + b"\n"
        except (TypeError, ValueError, PydanticSerializationError) as error:
            raise DataError(
                f"prompt id {prompt.id}: its metadata cannot be given to a reward function: {error}"
            ) from error
        try:
            answer = self._ask(request)
        except TimeoutError as error:
            line = self._locate()
            raise self._failure(line, f"did not return within {self.timeout_s:g} s", prompt) from error
        if answer is None:
            raise self._failure(self._stopped(), self._death(), prompt)
        if "failure" in answer:
            log.info("%s, prompt id %s: %s", self.path, prompt.id, answer["trace"] or answer["failure"])
            raise self._failure(answer["line"], answer["failure"], prompt)
        return float(answer["score"])

    def _load(self) -> None:
        self.connection.settimeout(LOADING_S)
        try:
            said = self._ask(b"")
        except TimeoutError as error:
            line = self._locate()
            raise RecipeError(f"{self.file}:{line}: is still being imported after {LOADING_S:g} s") from error
        if said is None:
            line = self._stopped()
            raise RecipeError(f"{self.file}:{line}: cannot be imported: it {self._death()}")
        if "unusable" in said:
            self.end()
            raise RecipeError(said["unusable"])
        self.first_line = said["line"]
        self.connection.settimeout(self.timeout_s)

    def _ask(self, request: bytes) -> dict[str, Any] | None:
        """Return the answer, or None when the process is no more; TimeoutError when it is busy for too long."""
        try:
            self.connection.sendall(request)
            line = self.answers.readline()
        except (BrokenPipeError, ConnectionResetError):
            return None
        return json.loads(line) if line.endswith(b"\n") else None

    def _locate(self) -> int:
        """Ask the process where it hangs, which needs no help of the interpreter's, end it, and return the line."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(ASKING_S)
        return self._stopped()

    def _stopped(self) -> int:
        """End what is left and return the line of the user's file that the interpreter's last words name, or 1."""
        self.end()
        self.printing.join(1.0)
        place = re.compile(rf'\s*File "{re.escape(str(Path(self.file).resolve()))}", line (\d+)')
        printed = list(self.printed)
        dumps = [index for index, line in enumerate(printed) if "most recent call first" in line]
        for line in printed[dumps[-1] :] if dumps else ():
            if found := place.match(line):
                return int(found[1])
        return getattr(self, "first_line", 1)

    def _death(self) -> str:
        code = self.process.returncode
        if code >= 0:
            return f"ended its process with exit code {code}"
        memory = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"ended its process with {signal.Signals(-code).name}{memory}"

    def _failure(self, line: int, what: str, prompt: Prompt) -> TrainingError:
        return TrainingError(f"{self.file}:{line}: {self.name}() {what} (prompt id {prompt.id})")


def _end(process: subprocess.Popen[bytes], connection: socket.socket, held: int) -> None:
    """Kill the group before its leader is reaped, while its number still belongs to it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    connection.close()
    os.close(held)


def _keep(stream: IO[bytes], name: str, printed: deque[str]) -> None:
    """Write to the log what the process prints, and remember the last of it."""
    with stream:
        while line := stream.readline(LINE):
            text = line.decode("utf-8", "replace").rstrip("\n")
            printed.append(text)
            printed_log.info("%s: %s", name, text)
