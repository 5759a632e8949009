"""Waiting for remote calls: always bounded, and every failure names the role, the call and the cause."""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rlhf import errors
from rlhf.errors import RlhfError, TrainingError

T = TypeVar("T")
OUR_ERROR = re.compile(r"^rlhf\.errors\.(?P<name>\w+): ", re.MULTILINE)


class RayPending(Generic[T]):
    """A `Pending` behind Ray object references, of which the last is the value; `what` names it for people.

    The earlier ones are what the call rests on (the building of its model), so that their failure is the one told.
    """

    def __init__(self, references: list[ray.ObjectRef], what: str, deadline_s: float) -> None:
        self.references = references
        self.what = what
        self.deadline_s = deadline_s

    def result(self) -> T:
        """Return the value; TrainingError when the call failed, its process died or the deadline passed."""
        return wait_for(self.references, self.what, self.deadline_s)[-1]


def wait_for(references: Any, what: str, deadline_s: float) -> Any:
    """Return the value of one reference or the values of a list, or raise an error for people.

    An RlhfError keeps its class, and with it the exit code; everything else becomes a TrainingError. `what` begins
    the message. The remote traceback is in the chain of causes.
    """
    try:
        return ray.get(references, timeout=deadline_s)
    except GetTimeoutError:
        raise TrainingError(f"{what} gave no answer within {deadline_s:.0f} s (ray.call_timeout_s)") from None
    except RayTaskError as error:
        raise _raised(what, error.cause) from error
    except RayActorError as error:
        raise (_not_started if error.actor_init_failed else _died)(what, error) from error
    except RayError as error:
        raise TrainingError(f"{what}: {_last_line(error)}") from error


def _raised(what: str, cause: Exception) -> RlhfError:
    if isinstance(cause, RlhfError):
        return type(cause)(f"{what}: {cause}")
    if isinstance(cause, RayError):
        return TrainingError(f"{what}: {_last_line(cause)}")
    lines = str(cause).strip().splitlines()
    return TrainingError(": ".join([what, type(cause).__name__, *lines[:1]]))


def _not_started(what: str, error: RayActorError) -> RlhfError:
    """Ray keeps only the text of what a constructor raised."""
    ours = list(OUR_ERROR.finditer(str(error)))
    if not ours:
        return TrainingError(f"{what}: the process could not start: {_last_line(error)}")
    message = str(error)[ours[-1].end() :].partition("\n\nThe above exception was")[0].strip()
    kind: type[RlhfError] = getattr(errors, ours[-1]["name"])
    return kind(f"{what}: {message}")


def _died(what: str, error: RayActorError) -> TrainingError:
    reason = _last_line(error).rpartition("Worker exit detail: ")[2].partition(" Some common causes")[0].rstrip(".")
    return TrainingError(f"{what}: the process died ({reason}); out of memory is the usual cause")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()
