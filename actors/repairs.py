"""Replacing lost replicas of a rollout engine, each in a thread of its own, while the others go on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError

from actors.balance import Balance
from actors.group import START_S
from actors.process import end
from actors.progress import Watch, id_of
from actors.restarts import Restarts
from actors.supervise import START_KEY, wait_for
from rlhf.errors import LostProcess, TrainingError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

ANSWERS_S = 30.0
"""A replica that says within this time neither that it is there nor that it makes progress is given up."""

SAY_S = 30.0
log = logging.getLogger("rlhf")
Start = Callable[[int], "ActorHandle"]
"""Starts the process of a replica, by its number, anew."""


class Repairs:
    """Replaces the members of `replicas` in place; `supply` gives a new one its weights before it serves.

    A replica is closed in `balance` until it serves. Whatever ends a repair without success is kept there.
    """

    def __init__(
        self,
        replicas: list[ActorHandle],
        balance: Balance,
        restarts: Restarts,
        start: Start | None,
        supply: Callable[[int], None],
        start_s: float = START_S,
    ) -> None:
        self.replicas = replicas
        self.balance = balance
        self.restarts = restarts
        self.start = start
        self.supply = supply
        self.start_s = start_s
        self.lock = threading.Lock()
        self.under_way: dict[int, Future[None]] = {}
        self.ended = False

    def begin(self, index: int, handle: ActorHandle, error: LostProcess) -> Future[None]:
        """Begin to replace what was replica `index`; the future ends when the one in its place serves.

        It holds the error where that is impossible: the given one where none may be replaced.
        """
        with self.lock:
            if index in self.under_way:
                return self.under_way[index]
            future: Future[None] = Future()
            if self.replicas[index] is not handle and index not in self.balance.closed:  # somebody was faster
                future.set_result(None)
                return future
            self.under_way[index] = future
            self.balance.close(index)
        threading.Thread(target=self._run, args=(index, error, future), name=f"repair-{index}", daemon=True).start()
        return future

    def restart(self, index: int, name: str) -> ActorHandle:
        """End a replica's process, start another in its place and wait until that has loaded its model."""
        end([self.replicas[index]], elsewhere=True)
        with self.lock:
            if self.ended or self.start is None:
                raise TrainingError(f"{name} is not started any more: the run ends")
            self.replicas[index] = handle = self.start(index)
        wait_for(handle.ping.remote(), f"{name}.start", self.start_s, START_KEY)
        return handle

    def settled(self) -> bool:
        """Wait for repairs that are under way, `start_s` at most; return whether every one so far was a success."""
        ends = time.monotonic() + self.start_s
        for index, future in list(self.under_way.items()):
            while not future.done():
                left = ends - time.monotonic()
                if left <= 0:
                    log.warning("the repair of replica %d has not ended within %.0f s", index, self.start_s)
                    return False
                if not wait([future], timeout=min(SAY_S, left)).done:
                    log.warning("waiting for the repair of replica %d, %.0f s at most", index, left)
        return self.balance.failure is None

    def stop(self) -> None:
        """Start no process any more."""
        with self.lock:
            self.ended = True

    def _run(self, index: int, error: LostProcess, future: Future[None]) -> None:
        try:
            self._replace(index, error)
        except BaseException as failure:
            self.balance.fail(failure)
            self._done(index)
            future.set_exception(failure)
        else:
            self.balance.open(index)
            self._done(index)
            future.set_result(None)

    def _replace(self, index: int, error: LostProcess) -> None:
        """Replace it again and again, while restarts are left and it is the new one that is lost."""
        while True:
            if self.start is None:
                raise error
            self.restarts.spend(error)
            before = self.replicas[index]
            try:
                self.supply(index)
                return
            except LostProcess as again:
                if self.replicas[index] is before or answers([self.replicas[index]])[0]:
                    raise
                error = again

    def _done(self, index: int) -> None:
        with self.lock:
            del self.under_way[index]


def answers(replicas: list[ActorHandle]) -> list[bool]:
    """Return which replicas say within `ANSWERS_S` that they are there, or are seen at work meanwhile."""
    watch, names = Watch(), [id_of(replica) for replica in replicas]
    calls = [replica.ping.remote() for replica in replicas]
    watch.look(names)
    _, busy = ray.wait(calls, num_returns=len(calls), timeout=ANSWERS_S)
    if busy:
        watch.look(names)
    at_work = {call for name, call in zip(names, calls, strict=True) if call in busy and name in watch.moved}
    return [call in at_work or _answered(call) for call in calls]


def _answered(call: ray.ObjectRef) -> bool:
    try:
        ray.get(call, timeout=0)
    except RayError:  # it failed, or has not ended
        return False
    return True
