"""Waiting for remote calls: always bounded, and every failure names the role, the rank, the call and the cause."""

from __future__ import annotations

import re
import time
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
from actors.balance import LOOK_S, LOOKS
from actors.progress import Watch, actor_of
from rlhf import errors
from rlhf.errors import LOST_RANK, LateProcess, LostProcess, RlhfError, TrainingError
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

CALL_KEY = "ray.call_timeout_s"
START_KEY = "ray.start_timeout_s"
RANK = re.compile(r"-\d+\.")


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
        """Return the value; TrainingError when a call failed, its process died or made no progress in time."""
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
        """Return the value; an error where a call failed, or where what was lost cannot be replaced (any more).

        Where the call was late and its second try is too, there is no third.
        """
        late = False
        while True:
            try:
                return self.pending.result()
            except LateProcess as error:
                if late:
                    raise error.second() from error
                late = True
                self.processes.mend(self.asked, error)
            except LostProcess as error:
                self.processes.mend(self.asked, error)
            self._begin()

    def _begin(self) -> None:
        self.asked = self.processes.current()
        self.pending = self.ask()


def wait_for(reference: ray.ObjectRef, name: str, deadline_s: float, key: str = CALL_KEY) -> Any:
    """Return the value of one call, as `wait_for_all` does."""
    return wait_for_all([reference], [name], deadline_s, key)[0]


def wait_for_all(
    references: Sequence[ray.ObjectRef], names: Sequence[str], deadline_s: float, key: str = CALL_KEY
) -> list[Any]:
    """Return the values of all calls, or raise an error for people as soon as one fails.

    A call may take as long as its process makes progress: it is late when nothing was seen of that for `deadline_s`,
    which the recipe sets by `key`. An RlhfError keeps its class, and with it the exit code; everything else becomes a
    TrainingError. The name of the call at fault begins the message: a rank that only lost its peer is not blamed for
    it. The remote traceback is in the chain of causes.
    """
    clock = Clock(deadline_s)
    while True:
        try:
            return ray.get(list(references), timeout=clock.look_in())
        except GetTimeoutError:
            if overdue := clock.overdue(references, names):
                raise late(overdue, deadline_s, key, clock.watch) from None
        except RayError as error:
            name, cause, reference = _at_fault(references, names, error)
            raise _translated(name, cause, reference) from cause


class Clock:
    """The time since the processes behind some calls were last seen to make progress."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self.began = time.monotonic()
        self.watch = Watch()

    def look_in(self) -> float:
        """Return the seconds until the next look at the processes."""
        return min(LOOK_S, self.deadline_s / LOOKS)

    def overdue(self, references: Sequence[ray.ObjectRef], names: Sequence[str]) -> list[tuple[str, ray.ObjectRef]]:
        """Return the names and calls that are late, after a look at the processes of all that have not ended."""
        done = set(ray.wait(list(references), num_returns=len(references), timeout=0)[0])
        unfinished = [(name, call) for name, call in zip(names, references, strict=True) if call not in done]
        self.watch.look([actor_of(call) for _, call in unfinished])
        since = time.monotonic() - self.deadline_s
        return [item for item in unfinished if self.watch.moved.get(actor_of(item[1]), self.began) <= since]


def late(
    calls: Sequence[tuple[str, ray.ObjectRef]], deadline_s: float, key: str = CALL_KEY, watch: Watch | None = None
) -> LateProcess:
    """Return what people are told of calls, with their names, whose processes made no progress within a deadline."""
    named = ", ".join(name for name, _ in calls[:TOLD])
    more = f" and {len(calls) - TOLD} more" if len(calls) > TOLD else ""
    place = death.place_of(calls[0][1])
    doing = watch.doing.get(actor_of(calls[0][1])) if watch else None
    error = LateProcess(
        f"{named}{more} gave no answer within {deadline_s:.0f} s ({key}){f' on {place}' if place else ''};"
        f" it hangs or waits for another process{f', and was last at: {doing}' if doing else ''}; if one piece of the"
        f" work takes that long, raise {key}"
    )
    error.call = RANK.sub(".", calls[0][0])
    return error


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
        return LOST_RANK in str(error.cause)
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
        return cause.within(name)
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
