"""The processes of a role that hold one model together, one rank each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from actors.process import end
from actors.restarts import Restarts
from actors.supervise import START_KEY, RayPending, Retried, wait_for, wait_for_all
from rlhf.engines.base import LearnerSpec
from rlhf.errors import LostProcess

if TYPE_CHECKING:
    from ray.actor import ActorHandle

T = TypeVar("T")
START_S = 900.0
"""How long a new process may show no progress until it answers; the default of `ray.start_timeout_s`."""


class RankGroup:
    """A role's processes, in the order of their ranks. Every call goes to all of them.

    Where a process dies or hangs, all are replaced by what `start` starts, as often as `restarts` allows, and a frozen
    model is built again. A model that is trained is lost with its process: it goes on from where it was saved.
    """

    def __init__(
        self,
        role: str,
        ranks: Sequence[ActorHandle],
        deadline_s: float,
        start: Callable[[], Sequence[ActorHandle]] | None = None,
        restarts: Restarts | None = None,
        start_s: float = START_S,
    ) -> None:
        self.role = role
        self.ranks = list(ranks)
        self.deadline_s = deadline_s
        self.start = start
        self.restarts = restarts or Restarts(role)
        self.start_s = start_s
        self.spec: LearnerSpec | None = None
        self.building: list[ray.ObjectRef] = []
        self.before_call: Callable[[], None] = _nothing
        self.lock = threading.RLock()
        if len(self.ranks) > 1:
            self._join()

    def build(self, spec: LearnerSpec) -> None:
        """Begin to build a model; a failure reaches the first call that waits, as an actor's calls keep their order."""
        self.spec = spec
        self.building = self.call("build", spec)

    def drop(self) -> None:
        """Free the model."""
        self.spec, self.building = None, []
        self.wait("drop")

    def call(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Begin a call on every rank, after `before_call`."""
        self.before_call()
        return self.begin(method, *arguments)

    def begin(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Begin a call on every rank, with nothing before it."""
        return [getattr(rank, method).remote(*arguments) for rank in self.ranks]

    def ask(self, method: str, combine: Callable[[list], T], *arguments: Any) -> Retried[T]:
        """Call every rank; the value is what `combine` makes of theirs."""
        return Retried(self, lambda: self.pending(method, self.call(method, *arguments), combine))

    def pending(self, method: str, calls: Sequence[ray.ObjectRef], combine: Callable[[list], T]) -> RayPending[T]:
        """Return what `combine` makes of the calls' values, one per rank; a failed build is told as theirs."""
        names, before = self.names(method), len(self.building)
        return RayPending([*self.building, *calls], names[:before] + names, self.deadline_s, _after(before, combine))

    def current(self) -> tuple[ActorHandle, ...]:
        """Return the processes as they are now."""
        return tuple(self.ranks)

    def mend(self, asked: tuple[ActorHandle, ...], error: LostProcess) -> None:
        """Replace all processes, unless that was done since they were asked, and build their frozen model again.

        Raises:
            LostProcess: the error, where their model is trained or none may be replaced.
        """
        with self.lock:
            if asked != self.current():
                return
            if self.start is None or (self.spec is not None and self.spec.optimizer is not None):
                raise error
            self.restarts.spend(error)
            end(self.ranks, elsewhere=True)
            self.ranks = list(self.start())
            if len(self.ranks) > 1:
                self._join()
            if self.spec is not None:
                self.building = self.begin("build", self.spec)
                wait_for_all(self.building, self.names("build"), max(self.deadline_s, self.start_s), START_KEY)

    def names(self, method: str) -> list[str]:
        """Return what people are told of a call to each rank: `policy-1.train`, or `policy.train` where one is all."""
        if len(self.ranks) == 1:
            return [f"{self.role}.{method}"]
        return [f"{self.role}-{rank}.{method}" for rank in range(len(self.ranks))]

    def wait(self, method: str, *arguments: Any) -> list[Any]:
        """Call every rank, without `before_call`, and wait for all."""
        return Retried(self, lambda: self.pending(method, self.begin(method, *arguments), list)).result()

    def kill(self, elsewhere: bool = False) -> None:
        """End the processes; `elsewhere` as for `actors.process.end`."""
        end(self.ranks, elsewhere)

    def _join(self) -> None:
        """Let the ranks meet at the first one's machine."""
        names, count = self.names("join"), len(self.ranks)
        address, port = wait_for(self.ranks[0].meeting_point.remote(), names[0], self.start_s, START_KEY)
        calls = [
            actor.join.remote(rank, count, address, port, self.deadline_s) for rank, actor in enumerate(self.ranks)
        ]
        wait_for_all(calls, names, self.start_s, START_KEY)


def _nothing() -> None:
    """Come before calls that need no preparation."""


def _after(before: int, combine: Callable[[list], T]) -> Callable[[list], T]:
    return lambda values: combine(values[before:])
