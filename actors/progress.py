"""The progress of processes, told through the cluster's own key-value store: whoever waits for a call may look there.

A process that works tells its pulse every `REPORT_S` seconds, where that has changed, from a thread of its own; so it
is known also while the process builds its model, and needs no call that would queue behind the work.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError
from ray.experimental import internal_kv

from rlhf.pulse import PULSE

if TYPE_CHECKING:
    from ray.actor import ActorHandle

REPORT_S = 2.0
ANSWER_S = 2.0
"""A store that takes longer says nothing of this look; `actors.head` watches it."""

NAMESPACE = b"rlhf"
JOB_DIGITS = 8
"""An actor's id ends with that of its job, in so many hexadecimal digits."""


def tell_progress() -> None:
    """Begin to tell the pulse of this actor's process, from its constructor on; a thread does so until it ends."""
    key = _key(ray.get_runtime_context().get_actor_id())
    threading.Thread(target=_tell, args=(key,), name="progress", daemon=True).start()


def forget_job() -> None:
    """Remove what the processes of this run have told."""
    with suppress(RayError):
        prefix = _prefix(ray.get_runtime_context().get_job_id())
        internal_kv._internal_kv_del(prefix, del_by_prefix=True, namespace=NAMESPACE)


class Watch:
    """When each of some processes, by actor id, was last seen to make progress; the clock is `time.monotonic`.

    One that tells nothing was never seen to. Whoever sees progress makes some: the waiting process's own pulse beats,
    so no two processes may wait for each other.
    """

    def __init__(self) -> None:
        self.beats: dict[str, int] = {}
        self.doing: dict[str, str] = {}
        self.moved: dict[str, float] = {}

    def look(self, actors: Sequence[str]) -> bool:
        """Ask for the progress of processes; return whether any has made some since the last look at it."""
        try:
            seen = [self._look(actor) for actor in dict.fromkeys(actors)]
        except RayError:  # no more of them is asked now: each would take as long
            return False
        if any(seen):
            PULSE.beat()
        return any(seen)

    def _look(self, actor: str) -> bool:
        told = _read(actor)
        if told is None:
            return False
        beats, self.doing[actor] = told
        before, self.beats[actor] = self.beats.get(actor), beats
        if before is None or before == beats:
            return False
        self.moved[actor] = time.monotonic()
        return True


def actor_of(call: ray.ObjectRef) -> str:
    """Return the id of the actor behind a call."""
    return str(call.task_id().actor_id().hex())


def id_of(handle: ActorHandle) -> str:
    """Return the id of an actor."""
    return str(handle._actor_id.hex())


def _tell(key: bytes) -> None:
    told: tuple[int, str] | None = None
    while True:
        now = PULSE.sampled()
        if now != told:
            with suppress(RayError):
                internal_kv._internal_kv_put(key, json.dumps(now).encode(), namespace=NAMESPACE)
                told = now
        time.sleep(REPORT_S)


def _read(actor: str) -> tuple[int, str] | None:
    client = internal_kv.internal_kv_get_gcs_client()
    if client is None:
        return None
    told = client.internal_kv_get(_key(actor), NAMESPACE, timeout=ANSWER_S)
    if told is None:
        return None
    beats, doing = json.loads(told)
    return int(beats), str(doing)


def _prefix(job: str) -> bytes:
    return f"pulse/{job}/".encode()


def _key(actor: str) -> bytes:
    return _prefix(actor[-JOB_DIGITS:]) + actor.encode()
