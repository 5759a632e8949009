"""Waiting for remote calls: always bounded, and every failure names the role, the rank, the call and the cause."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors import death
from rlhf import errors
from rlhf.engines.ranks import LOST
from rlhf.errors import LostProcess, RlhfError, TrainingError
from rlhf.roles import Pending

if TYPE_CHECKING:
    from ray.actor import ActorHandle

T = TypeVar("T")
OUR_ERROR = re.compile(r"^rlhf\.errors\.(?P<name>\w+): ", re.MULTILINE)
VICTIM = re.compile(r"closed by peer|reset by peer|broken pipe|connection (refused|aborted)|timed? ?out|nccl", re.I)
"""What a collective says where another rank is at fault."""

LOSSES = (ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
"""What Ray raises where a process is gone."""

GRACE_S = 3.0
"""How long the other calls may take to tell what really went wrong."""

TOLD = 3
"""So many late calls are named."""


def last(values: Sequence[T]) -> T:
    """Return the last value."""
    return values[-1]


class RayPending(Generic[T]):
    """A `Pending` behind calls to one or more processes; `combine` makes its value of theirs, in their order.

    `names` tell the calls apart for people. With the default `combine` the earlier calls are what the last one rests
    on (the building of its model).
    """

    def __init__(
        self,
        references: Sequence[ray.ObjectRef],
        names: Sequence[str],
        deadline_s: float,
        combine: Callable[[list[Any]], T] = last,
    ) -> None:
        self.references = references
        self.names = names
        self.deadline_s = deadline_s
        self.combine = combine

    def result(self) -> T:
        """Return the value; TrainingError when a call failed, its process died or the deadline passed."""
        return self.combine(wait_for_all(self.references, self.names, self.deadline_s))


class Processes(Protocol):
    """The processes of a role, which can be replaced."""

    def current(self) -> tuple[ActorHandle, ...]:
        """Return those that are called now."""
        ...

    def mend(self, asked: tuple[ActorHandle, ...], error: LostProcess) -> None:
        """Replace what was lost of the processes asked, so that the call can be made again; or raise an error."""
        ...


class Retried(Generic[T]):
    """A `Pending` whose call is made again when a process was lost and could be replaced."""

    def __init__(self, processes: Processes, ask: Callable[[], Pending[T]]) -> None:
        self.processes = processes
        self.ask = ask
        self._begin()

    def result(self) -> T:
        """Return the value; an error where a call failed, or where what was lost cannot be replaced (any more)."""
        while True:
            try:
                return self.pending.result()
            except LostProcess as error:
                self.processes.mend(self.asked, error)
            self._begin()

    def _begin(self) -> None:
        self.asked = self.processes.current()
        self.pending = self.ask()


def wait_for(reference: ray.ObjectRef, name: str, deadline_s: float) -> Any:
    """Return the value of one call, as `wait_for_all` does."""
    return wait_for_all([reference], [name], deadline_s)[0]


def wait_for_all(references: Sequence[ray.ObjectRef], names: Sequence[str], deadline_s: float) -> list[Any]:
    """Return the values of all calls, or raise an error for people as soon as one fails.

    An RlhfError keeps its class, and with it the exit code; everything else becomes a TrainingError. The name of the
    call at fault begins the message: a rank that only lost its peer is not blamed for it. The remote traceback is in
    the chain of causes.
    """
    try:
        return ray.get(list(references), timeout=deadline_s)
    except GetTimeoutError:
        raise late(references, names, deadline_s) from None
    except RayError as error:
        name, cause, reference = _at_fault(references, names, error)
        raise _translated(name, cause, reference) from cause


def late(references: Sequence[ray.ObjectRef], names: Sequence[str], deadline_s: float) -> LostProcess:
    """Return what people are told where calls have not ended within their deadline."""
    done = set(ray.wait(list(references), num_returns=len(references), timeout=0)[0])
    open_calls = [(name, call) for name, call in zip(names, references, strict=True) if call not in done]
    told = ", ".join(name for name, _ in open_calls[:TOLD])
    more = f" and {len(open_calls) - TOLD} more" if len(open_calls) > TOLD else ""
    place = death.place_of(open_calls[0][1]) if open_calls else None
    return LostProcess(
        f"{told}{more} gave no answer within {deadline_s:.0f} s (ray.call_timeout_s){f' on {place}' if place else ''};"
        " it hangs or waits for another process; if the work takes that long, raise ray.call_timeout_s"
    )


def _at_fault(
    references: Sequence[ray.ObjectRef], names: Sequence[str], first: RayError
) -> tuple[str, RayError, ray.ObjectRef]:
    """Return the name of the failed call that explains the others, its error and itself."""
    failed = [
        (name, error, reference)
        for name, reference in zip(names, references, strict=True)
        if (error := _error_of(reference, GRACE_S if len(references) > 1 else 0)) is not None
    ]
    return min(failed, key=lambda item: _is_victim(item[1]), default=(names[0], first, references[0]))


def _error_of(reference: ray.ObjectRef, wait_s: float) -> RayError | None:
    if not ray.wait([reference], timeout=wait_s)[0]:
        return None
    try:
        ray.get(reference, timeout=0)
    except RayError as error:
        return error
    return None


def _is_victim(error: RayError) -> bool:
    if isinstance(error, RayTaskError) and isinstance(error.cause, RlhfError):
        return LOST in str(error.cause)
    return not isinstance(error, RayActorError) and bool(VICTIM.search(str(error)))


def _translated(name: str, error: RayError, reference: ray.ObjectRef) -> RlhfError:
    if isinstance(error, RayTaskError):
        return _raised(name, error.cause)
    if isinstance(error, RayActorError) and error.actor_init_failed:
        return _not_started(name, error)
    if isinstance(error, LOSSES):
        return LostProcess(f"{name}: the process died {death.told(error, reference)}")
    return TrainingError(f"{name}: {_last_line(error)}")


def _raised(name: str, cause: Exception) -> RlhfError:
    if isinstance(cause, RlhfError):
        return type(cause)(f"{name}: {cause}")
    if isinstance(cause, RayError):
        return TrainingError(f"{name}: {_last_line(cause)}")
    lines = str(cause).strip().splitlines()
    return TrainingError(": ".join([name, type(cause).__name__, *lines[:1]]))


def _not_started(name: str, error: RayActorError) -> RlhfError:
    """Ray keeps only the text of what a constructor raised."""
    ours = list(OUR_ERROR.finditer(str(error)))
    if not ours:
        return TrainingError(f"{name}: the process could not start: {_last_line(error)}")
    message = str(error)[ours[-1].end() :].partition("\n\nThe above exception was")[0].strip()
    kind: type[RlhfError] = getattr(errors, ours[-1]["name"])
    return kind(f"{name}: {message}")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
