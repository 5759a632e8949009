"""Which replica gets the next prompts: the one with the fewest tokens still to read and write, if it has room."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.types import Sampling

LOOK_S, LOOKS = 10.0, 10
"""A wait looks that often whether the replicas make progress, and so often within its deadline at least."""

FILL = 2
"""A replica is given so many times the sequences that it generates at once: while some finish, others wait there."""


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
        self.closed: set[int] = set()
        self.paused = False
        self.failure: BaseException | None = None
        self.ended = 0.0
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
            self._check()
            while self.order and not self.paused:
                outstanding, replica = heapq.heappop(self.order)
                if outstanding == self.tokens[replica] and self._has_room(replica):
                    self._change(replica, tokens, sequences)
                    return replica
            return None

    def give_back(self, replica: int, tokens: float, sequences: int, drawn: Sequence[int] = ()) -> None:
        """Enter that a call has ended, and the lengths of the responses that it brought."""
        with self.changed:
            self._change(replica, -tokens, -sequences)
            self.responses += len(drawn)
            self.response_tokens += sum(drawn)
            self.ended = time.monotonic()
            self.changed.notify_all()

    def wait_for_room(self, timeout_s: float, at_work: Callable[[], bool] = lambda: False) -> bool:
        """Wait until some replica has room; return whether one has. While one is replaced, no time passes.

        It is given up when for `timeout_s` no call has ended and `at_work`, which is asked now and then, has not seen a
        replica make progress.
        """
        return self._wait(lambda: self.failure is not None or self._any_room(), timeout_s, at_work)

    def close(self, replica: int) -> None:
        """Send nothing more to a replica."""
        with self.changed:
            self.closed.add(replica)

    def open(self, replica: int) -> None:
        """Send to it again."""
        with self.changed:
            self.closed.discard(replica)
            self._change(replica, 0, 0)
            self.changed.notify_all()

    def fail(self, failure: BaseException) -> None:
        """Let all who want to send know that a replica is gone for good."""
        with self.changed:
            self.failure = self.failure or failure
            self.changed.notify_all()

    def pause(self, timeout_s: float, at_work: Callable[[], bool] = lambda: False) -> bool:
        """Send nothing to any replica, and wait until none has calls; return whether that came to be.

        It is given up as `wait_for_room` gives up, also while a replica is replaced.
        """
        with self.changed:
            self.paused = True
        return self._wait(lambda: not any(self.sequences), timeout_s, at_work, pausing=True)

    def resume(self) -> None:
        """Send again."""
        with self.changed:
            self.paused = False
            self.changed.notify_all()

    def _wait(
        self, ready: Callable[[], bool], timeout_s: float, at_work: Callable[[], bool], pausing: bool = False
    ) -> bool:
        began = time.monotonic()
        while True:
            with self.changed:
                if self.changed.wait_for(ready, min(LOOK_S, timeout_s / LOOKS)):
                    if not pausing:
                        self._check()
                    return True
                if not pausing and (self.closed or self.paused):
                    began = time.monotonic()
                ended = self.ended
            if at_work():  # not under the lock: it asks the cluster
                began = time.monotonic()
            elif time.monotonic() - max(began, ended) >= timeout_s:
                return False

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _any_room(self) -> bool:
        return not self.paused and any(map(self._has_room, range(len(self.sequences))))

    def _has_room(self, replica: int) -> bool:
        return self.sequences[replica] < self.room and replica not in self.closed

    def _change(self, replica: int, tokens: float, sequences: int) -> None:
        """Keep in `order` the newest entry of each replica with room; older ones that no longer hold may stay."""
        self.sequences[replica] += sequences
        self.tokens[replica] = self.tokens[replica] + tokens if self.sequences[replica] else 0.0
        if self._has_room(replica):
            heapq.heappush(self.order, (self.tokens[replica], replica))
        if len(self.order) > 8 * len(self.tokens):
            self.order = [(tokens, index) for index, tokens in enumerate(self.tokens) if self._has_room(index)]
            heapq.heapify(self.order)
