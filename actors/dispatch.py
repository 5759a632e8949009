"""Prompts to replicas as these become free, balanced by the tokens that each has still to read and write."""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from actors.objects import Asked, Drawn
from actors.supervise import wait_for
from rlhf.errors import TrainingError
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from ray.actor import ActorHandle

FILL = 2
"""A replica is given so many times the sequences that it generates at once: while some finish, others wait there."""

CALLS = 16
"""Calls that a full replica has in flight. One call is done when its longest response is: many small calls hold the
place of finished responses for a shorter time than few large ones, and each costs the controller about 0.3 ms."""


class Balance:
    """The tokens and sequences that each replica has outstanding, and how long a response is expected to be.

    Each is a prompt's tokens plus the expected response's: the mean of all responses so far, and before any has come
    the most that may be. All calls of an engine share one balance. The methods may be called from any thread.
    """

    def __init__(self, replicas: int, max_sequences: int) -> None:
        self.room = FILL * max_sequences
        self.tokens = [0.0] * replicas
        self.sequences = [0] * replicas
        self.order = [(0.0, replica) for replica in range(replicas)]
        self.responses = self.response_tokens = 0
        self.changed = threading.Condition()

    def expected(self, sampling: Sampling) -> float:
        """Return the tokens of a response that is about to be drawn."""
        if not self.responses:
            return sampling.max_tokens
        return min(sampling.max_tokens, self.response_tokens / self.responses)

    def take(self, tokens: float, sequences: int) -> int | None:
        """Return the replica with the fewest tokens among those with room, now with these more; None where none has.

        The last prompt that a replica takes may exceed its room by some samples.
        """
        with self.changed:
            while self.order:
                outstanding, replica = heapq.heappop(self.order)
                if outstanding == self.tokens[replica] and self.sequences[replica] < self.room:
                    self._change(replica, tokens, sequences)
                    return replica
            return None

    def give_back(self, replica: int, tokens: float, sequences: int, drawn: Sequence[int] = ()) -> None:
        """Enter that a call has ended, and the lengths of the responses that it brought."""
        with self.changed:
            self._change(replica, -tokens, -sequences)
            self.responses += len(drawn)
            self.response_tokens += sum(drawn)
            self.changed.notify_all()

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait until some replica has room; return whether one has."""
        with self.changed:
            return self.changed.wait_for(lambda: min(self.sequences) < self.room, timeout_s)

    def _change(self, replica: int, tokens: float, sequences: int) -> None:
        """Keep in `order` the newest entry of each replica with room; older ones that no longer hold may stay."""
        self.sequences[replica] += sequences
        self.tokens[replica] = self.tokens[replica] + tokens if self.sequences[replica] else 0.0
        if self.sequences[replica] < self.room:
            heapq.heappush(self.order, (self.tokens[replica], replica))
        if len(self.order) > 8 * len(self.tokens):
            self.order = [(self.tokens[index], index) for index, n in enumerate(self.sequences) if n < self.room]
            heapq.heapify(self.order)


@dataclass
class Call:
    """The prompts, by row, that one replica was sent."""

    replica: int
    rows: list[int]
    tokens: float
    sequences: int
    sent: float
    reference: Any


class Dispatch:
    """A `Pending` of rollouts: sends prompts to replicas as they have room, also while nobody waits for the result.

    The samples of a prompt stay together. Which replica draws what depends on timing; the result does not, as seeds
    decide samples and rows keep their order.
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
    ) -> None:
        self.replicas = replicas
        self.balance = balance
        self.prompts = prompts
        self.sampling = sampling
        self.seeds = seeds
        self.deadline_s = deadline_s
        self.role = role
        self.unsent = deque(range(len(prompts)))
        self.flying: dict[int, Call] = {}
        self.calls = 0
        self.ended: SimpleQueue[tuple[int, Future[Drawn]]] = SimpleQueue()
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
            TrainingError: a replica failed, or one of its calls took longer than the deadline; it is named.
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
                if self.flying:
                    self._collect()
                elif not self.balance.wait_for_room(self.deadline_s):  # other calls take all of it
                    raise TrainingError(f"{self.role} had no room within {self.deadline_s:.0f} s (ray.call_timeout_s)")
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
        reference = self.replicas[replica].draw.remote(asked)
        number, self.calls = self.calls, self.calls + 1
        call = Call(replica, rows, tokens, sum(map(len, asked.seeds)), time.monotonic(), reference)
        self.flying[number] = call

        def end(future: Future[Drawn]) -> None:  # in one of Ray's threads
            lengths = () if future.exception() else future.result().lengths.tolist()
            self.balance.give_back(replica, tokens, call.sequences, lengths)
            self.ended.put((number, future))

        reference.future().add_done_callback(end)

    def _collect(self) -> None:
        """Wait for the next call to end and keep its rollouts."""
        oldest = next(iter(self.flying.values()))
        try:
            number, future = self.ended.get(timeout=max(0.0, oldest.sent + self.deadline_s - time.monotonic()))
        except Empty:
            raise TrainingError(
                f"{self._name(oldest)} gave no answer within {self.deadline_s:.0f} s (ray.call_timeout_s)"
            ) from None
        call = self.flying.pop(number)
        if future.exception() is not None:
            wait_for(call.reference, self._name(call), self.deadline_s)
        prompts, seeds = [self.prompts[row] for row in call.rows], [self.seeds[row] for row in call.rows]
        rollouts = future.result().rollouts(prompts, seeds)
        for row, row_seeds in zip(call.rows, seeds, strict=True):
            self.drawn[row] = [next(rollouts) for _ in row_seeds]

    def _name(self, call: Call) -> str:
        return f"{self.role}-{call.replica}.generate"
