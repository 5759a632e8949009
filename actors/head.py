"""Watches Ray's head: without it Ray ends this process after a minute, with a code and a message of its own."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import psutil
import ray
from ray._private import worker
from ray.exceptions import RayError
from ray.experimental import internal_kv

from rlhf.errors import ResourceError
from rlhf.interrupts import COMMAND

POLL_S = 2.0
PROBE_S = 2.0
"""One probe takes no longer; a single one that fails says nothing."""

PATIENCE_S = 20.0
"""How long nothing may listen at the head's address; Ray gives up after 60 s."""

SILENCE_S = 60.0
"""How long a head that still listens, on a machine that is busy or hangs, may answer nothing."""

COMES_BACK_S = 25.0
"""How long the run may take to leave what it waits for when the head is lost."""


class HeadLost(BaseException):
    """Raised in the thread of a run whose head is lost, wherever that thread is; `HeadWatch.settle` says why."""


class HeadWatch:
    """Ends the run of the thread that makes it when the head at `address` is gone, by HeadLost in that thread.

    Where the thread does not come back from what it waits for, a command ends its process. A library does not: then
    Ray itself ends the process a minute after it has lost the head, unless what the thread waits for ends before.
    `say` logs the reason first.
    """

    def __init__(self, address: str, say: Callable[[str], None]) -> None:
        host, _, port = address.rpartition(":")
        self.address = (host, int(port))
        self.say = say
        self.thread = threading.get_ident()
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.left = threading.Event()
        self.lost: str | None = None
        threading.Thread(target=self._watch, name="ray-head", daemon=True).start()

    def settle(self) -> str | None:
        """Watch no more; return why the head is lost, None where it is not. HeadLost is not raised any more."""
        while True:
            try:
                with self.lock:
                    self.ended.set()
                    _raise_in(self.thread, None)
                    return self.lost
            except HeadLost:
                continue

    def _watch(self) -> None:
        heard = reached = time.monotonic()
        while not self.ended.wait(POLL_S):
            if self._listens():
                reached = time.monotonic()
                if self._answers():
                    heard = reached
            if time.monotonic() - reached > PATIENCE_S or time.monotonic() - heard > SILENCE_S:
                self._give_up()
                return

    def _listens(self) -> bool:
        try:
            socket.create_connection(self.address, PROBE_S).close()
        except OSError:
            return False
        return True

    def _answers(self) -> bool:
        return head_answers()

    def _give_up(self) -> None:
        """Raise HeadLost in the run's thread, and see that it arrives."""
        with self.lock:
            if self.ended.is_set():
                return
            self.lost = (
                f"Ray's head at {self.address[0]}:{self.address[1]} is gone, and with it every process of this run;"
                " the same command goes on from the last saved state"
            )
            self.say(self.lost)
            _raise_in(self.thread, HeadLost)
        if not self.left.wait(COMES_BACK_S) and COMMAND.is_set():
            self._end_process()

    def _end_process(self) -> None:
        """End what Ray started here, and this process: every thread may wait for Ray, so none is asked."""
        sys.stderr.write(f"error: {self.lost}\n")
        for process in psutil.Process().children(recursive=True):
            process.kill()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(ResourceError.exit_code)


def head_answers() -> bool:
    """Return whether the head answers a question within `PROBE_S`: Ray's other calls would wait for it for long."""
    client = internal_kv.internal_kv_get_gcs_client()
    try:
        if client is not None:
            client.internal_kv_get(b"head", b"rlhf", timeout=PROBE_S)
    except RayError:
        return False
    return client is not None


def leave_lost_head(leave: Callable[[], object] = ray.shutdown) -> bool:
    """End what this process started of a Ray whose head is gone, and `leave` it; return whether that came to an end."""
    for process in _processes_of_ray():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    leaving = threading.Thread(target=leave, name="leave-ray", daemon=True)
    leaving.start()
    leaving.join(COMES_BACK_S)
    return not leaving.is_alive()


def _processes_of_ray() -> list[psutil.Process]:
    """Return what Ray's node in this process has started, with all that came of it."""
    node = worker._global_node
    started = [info.process.pid for infos in node.all_processes.values() for info in infos] if node else []
    found: list[psutil.Process] = []
    for pid in started:
        try:
            process = psutil.Process(pid)
            found += [*process.children(recursive=True), process]
        except psutil.NoSuchProcess:
            continue
    return found


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in a thread as soon as it runs Python again; None takes back what it has not yet raised."""
    raised = ctypes.py_object(error) if error else None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
