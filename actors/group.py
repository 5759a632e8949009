"""The processes of a role that hold one model together, one rank each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from actors.supervise import RayPending, wait_for, wait_for_all

if TYPE_CHECKING:
    from ray.actor import ActorHandle

T = TypeVar("T")
JOIN_S = 300.0
"""How long ranks may take to find each other; most of it is the import of libraries."""


class RankGroup:
    """A role's processes, in the order of their ranks. Every call goes to all of them."""

    def __init__(self, role: str, ranks: Sequence[ActorHandle], deadline_s: float) -> None:
        self.role = role
        self.ranks = list(ranks)
        self.deadline_s = deadline_s
        self.before_call: Callable[[], None] = _nothing
        if len(self.ranks) > 1:
            self._join()

    def call(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Begin a call on every rank, after `before_call`."""
        self.before_call()
        return self.begin(method, *arguments)

    def begin(self, method: str, *arguments: Any) -> list[ray.ObjectRef]:
        """Begin a call on every rank, with nothing before it."""
        return [getattr(rank, method).remote(*arguments) for rank in self.ranks]

    def pending(
        self, before: Sequence[ray.ObjectRef], method: str, calls: Sequence[ray.ObjectRef], combine: Callable[[list], T]
    ) -> RayPending[T]:
        """Return what `combine` makes of the calls' values, one per rank; a failure of one of `before` is theirs."""
        names = self.names(method)
        return RayPending(
            [*before, *calls], names[: len(before)] + names, self.deadline_s, _after(len(before), combine)
        )

    def names(self, method: str) -> list[str]:
        """Return what people are told of a call to each rank: `policy-1.train`, or `policy.train` where one is all."""
        if len(self.ranks) == 1:
            return [f"{self.role}.{method}"]
        return [f"{self.role}-{rank}.{method}" for rank in range(len(self.ranks))]

    def wait(self, method: str, *arguments: Any) -> list[Any]:
        """Call every rank, without `before_call`, and wait for all."""
        return wait_for_all(self.begin(method, *arguments), self.names(method), self.deadline_s)

    def kill(self) -> None:
        """End the processes."""
        for rank in self.ranks:
            ray.kill(rank)

    def _join(self) -> None:
        """Let the ranks meet at the first one's machine."""
        names, count = self.names("join"), len(self.ranks)
        address, port = wait_for(self.ranks[0].meeting_point.remote(), names[0], JOIN_S)
        calls = [
            actor.join.remote(rank, count, address, port, self.deadline_s) for rank, actor in enumerate(self.ranks)
        ]
        wait_for_all(calls, names, JOIN_S)


def _nothing() -> None:
    """Come before calls that need no preparation."""


def _after(before: int, combine: Callable[[list], T]) -> Callable[[list], T]:
    return lambda values: combine(values[before:])
