"""Waiting for remote calls: always bounded, and every failure names the role, the call and the cause."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rlhf.errors import RlhfError, TrainingError

T = TypeVar("T")


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
    """Return the value of one reference or the values of a list, or raise an error for people."""
    try:
        return ray.get(references, timeout=deadline_s)
    except GetTimeoutError:
        raise TrainingError(f"{what} gave no answer within {deadline_s:.0f} s (ray.call_timeout_s)") from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, RlhfError):
            raise type(cause)(f"{what}: {cause}") from error
        raise TrainingError(f"{what}: {type(cause).__name__}: {cause}") from error
    except RayActorError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise TrainingError(f"{what}: the process died ({reason}); out of memory is the usual cause") from error
