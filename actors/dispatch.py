"""Prompts to replicas as these become free, balanced by the tokens that each has still to read and write."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from actors.balance import LOOK_S, LOOKS, Balance
from actors.objects import Asked, Drawn
from actors.progress import Watch, actor_of
from actors.supervise import CALL_KEY, late, wait_for
from rlhf.errors import LostProcess, TrainingError
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from ray.actor import ActorHandle

CALLS = 16
"""Calls that a full replica has in flight. One call is done when its longest response is: many small calls hold the
place of finished responses for a shorter time than few large ones, and each costs the controller about 0.3 ms."""

Replace = Callable[[int, "ActorHandle", LostProcess], "Future[None]"]
"""Begins to replace a replica, by its number and what it was; the future ends when the new one serves."""


@dataclass
class Call:
    """The prompts, by row, that one replica was sent."""

    replica: int
    handle: ActorHandle
    rows: list[int]
    tokens: float
    sequences: int
    sent: float
    reference: Any


class Dispatch:
    """A `Pending` of rollouts: sends prompts to replicas as they have room, also while nobody waits for the result.

    The samples of a prompt stay together. Which replica draws what depends on timing; the result does not, as seeds
    decide samples and rows keep their order. When a replica is lost, its unfinished prompts are sent again, to whom has
    room, while `replace` puts another in its place.
    """

    def __init__(
        self,
        replicas: Sequence[ActorHandle],
        balance: Balance,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seeds: Sequence[Sequence[int]],
        deadline_s: float,
        role: str,
        replace: Replace | None = None,
        at_work: Callable[[], bool] = lambda: False,
    ) -> None:
        self.replicas = replicas
        self.balance = balance
        self.prompts = prompts
        self.sampling = sampling
        self.seeds = seeds
        self.deadline_s = deadline_s
        self.role = role
        self.replace = replace
        self.at_work = at_work
        self.watch = Watch()
        self.late: set[int] = set()
        self.look_every = min(LOOK_S, deadline_s / LOOKS)
        self.next_look = time.monotonic() + self.look_every
        self.unsent = deque(range(len(prompts)))
        self.flying: dict[int, Call] = {}
        self.calls = 0
        self.ended: SimpleQueue[tuple[int | None, Future[Any]]] = SimpleQueue()
        self.drawn: dict[int, list[Rollout]] = {}
        self.failure: BaseException | None = None
        self.thread: threading.Thread | None = None
        self._send()
        if self.unsent:
            self.thread = threading.Thread(target=self._run, name=f"{role}-dispatch", daemon=True)
            self.thread.start()

    def result(self) -> list[Rollout]:
        """Return all rollouts in the order of prompts and seeds.

        Raises:
            TrainingError: a replica failed; it is named.
            LostProcess: it died or took longer than the deadline, and cannot be replaced.
        """
        if self.thread is None:
            self._run()
        else:
            self.thread.join()
        if self.failure is not None:
            raise self.failure
        return [rollout for row in range(len(self.prompts)) for rollout in self.drawn[row]]

    def stop(self) -> None:
        """Send no more prompts; what is with the replicas is drawn in vain."""
        self.unsent.clear()
        self.failure = self.failure or TrainingError(f"{self.role}.generate was given up")

    def _run(self) -> None:
        try:
            while self.flying or self.unsent:
                if self.failure is not None:
                    self.unsent.clear()
                if self.flying:
                    self._collect()
                elif self.unsent and not self.balance.wait_for_room(self.deadline_s, self.at_work):  # others take it
                    raise TrainingError(f"{self.role} had no room within {self.deadline_s:.0f} s ({CALL_KEY})")
                self._send()
        except BaseException as error:
            self.unsent.clear()
            self.flying.clear()
            self.failure = self.failure or error

    def _send(self) -> None:
        """Give prompts to the replicas that have room; a replica's share goes in few calls where it is the last."""
        shares: dict[int, tuple[list[int], list[float]]] = {}
        expected = self.balance.expected(self.sampling)
        while self.unsent:
            row = self.unsent[0]
            samples = len(self.seeds[row])
            tokens = (len(self.prompts[row].tokens) + expected) * samples
            replica = self.balance.take(tokens, samples)
            if replica is None:
                break
            rows, costs = shares.setdefault(replica, ([], []))
            rows.append(self.unsent.popleft())
            costs.append(tokens)
        for replica, (rows, costs) in shares.items():
            most = len(rows) if not self.unsent else max(1, self.balance.room // CALLS // len(self.seeds[rows[0]]))
            for start in range(0, len(rows), most):
                self._call(replica, rows[start : start + most], sum(costs[start : start + most]))

    def _call(self, replica: int, rows: list[int], tokens: float) -> None:
        asked = Asked.of([self.prompts[row] for row in rows], self.sampling, [self.seeds[row] for row in rows])
        handle = self.replicas[replica]
        reference = handle.draw.remote(asked)
        number, self.calls = self.calls, self.calls + 1
        call = Call(replica, handle, rows, tokens, sum(map(len, asked.seeds)), time.monotonic(), reference)
        self.flying[number] = call

        def end(future: Future[Drawn]) -> None:  # in one of Ray's threads
            lengths = () if future.exception() else future.result().lengths.tolist()
            self.balance.give_back(replica, tokens, call.sequences, lengths)
            self.ended.put((number, future))

        reference.future().add_done_callback(end)

    def _collect(self) -> None:
        """Wait for the next call to end and keep its rollouts, or for a replica to be replaced."""
        try:
            number, future = self.ended.get(timeout=max(0.0, self.next_look - time.monotonic()))
        except Empty:
            self._look()
            return
        if number is None:
            future.result()
            return
        call = self.flying.pop(number, None)
        if call is None:  # its prompts are drawn again
            return
        if future.exception() is not None:
            try:
                wait_for(call.reference, self._name(call), self.deadline_s)
            except LostProcess as error:
                self._lose(call, error)
            return
        prompts, seeds = [self.prompts[row] for row in call.rows], [self.seeds[row] for row in call.rows]
        rollouts = future.result().rollouts(prompts, seeds)
        for row, row_seeds in zip(call.rows, seeds, strict=True):
            self.drawn[row] = [next(rollouts) for _ in row_seeds]

    def _look(self) -> None:
        """Lose a call whose replica has made no progress within the deadline; TrainingError where its prompts were late
        before.
        """
        now = time.monotonic()
        self.next_look = now + self.look_every
        self.watch.look([actor_of(call.reference) for call in self.flying.values()])
        for call in self.flying.values():
            if now - max(call.sent, self.watch.moved.get(actor_of(call.reference), 0.0)) >= self.deadline_s:
                error = late([(self._name(call), call.reference)], self.deadline_s, watch=self.watch)
                rows = {row for other in self.flying.values() if other.handle is call.handle for row in other.rows}
                if self.late & rows:
                    raise error.second() from error
                self.late |= rows
                self._lose(call, error)
                return

    def _lose(self, lost: Call, error: LostProcess) -> None:
        """Take back all that is with the replica of a call, and begin to replace it."""
        if self.replace is None:
            raise error
        gone = [number for number, call in self.flying.items() if call.handle is lost.handle]
        calls = [self.flying.pop(number) for number in gone]
        rows = {*lost.rows, *(row for call in calls for row in call.rows)}
        self.unsent.extendleft(sorted(rows, reverse=True))
        replaced = self.replace(lost.replica, lost.handle, error)
        replaced.add_done_callback(lambda future: self.ended.put((None, future)))

    def _name(self, call: Call) -> str:
        return f"{self.role}-{call.replica}.generate"
