"""Calls to other processes: bounded in time, and every failure is told in words, with role, call and cause."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import OutOfMemoryError

from actors import death, process, supervise
from actors.supervise import RayPending, wait_for, wait_for_all
from rlhf.errors import (
    DataError,
    GuardError,
    LateProcess,
    LostProcess,
    RecipeError,
    ResourceError,
    RlhfError,
    TrainingError,
)

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

DEADLINE_S = 60.0
NAMES = ["policy-0.train", "policy-1.train"]


class TwoParts(Exception):
    """Cannot be built again from its text, so Ray cannot bring it back."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


class HoldsLock(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("the lock is held")
        self.lock = threading.Lock()


class Wrapped(Exception):
    pass


class Role:
    def __init__(self, failure: BaseException | None = None, hidden: bool = False) -> None:
        try:
            if failure:
                raise failure
        except RlhfError as error:
            if hidden:
                raise Wrapped("while building") from error
            raise

    def answer(self, value: int) -> int:
        return value

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os._exit(1)

    def end(self, how: int) -> None:
        os.kill(os.getpid(), how)
        time.sleep(60)

    def leave(self) -> None:
        sys.exit(4)

    def fail(self, failure: Exception) -> None:
        raise failure

    def fail_in_two_parts(self) -> None:
        raise TwoParts("this", "that")

    def fail_with_lock(self) -> None:
        raise HoldsLock


def start(*arguments: Any) -> Any:
    return ray.remote(Role).options(num_cpus=0).remote(*arguments)


@pytest.fixture(scope="module")
def role(local_ray: None) -> Iterator[Any]:
    actor = start()
    ray.get(actor.answer.remote(0), timeout=DEADLINE_S)
    yield actor
    ray.kill(actor)


def failure(reference: Any, deadline_s: float = DEADLINE_S) -> RlhfError:
    """Return what `wait_for` raises."""
    with pytest.raises(RlhfError) as caught:
        wait_for(reference, "policy.train", deadline_s)
    return caught.value


def test_values_arrive_and_the_last_reference_is_the_pending_value(role):
    assert wait_for(role.answer.remote(3), "policy.answer", DEADLINE_S) == 3
    calls, names = [role.answer.remote(1), role.answer.remote(2)], ["policy-0.answer", "policy-1.answer"]
    assert wait_for_all(calls, names, DEADLINE_S) == [1, 2]
    assert RayPending(calls, names, DEADLINE_S).result() == 2
    assert RayPending(calls, names, DEADLINE_S, sum).result() == 3


def test_a_failed_build_is_told_instead_of_the_call_that_rests_on_it(role):
    building = role.fail.remote(DataError("no such folder"))
    pending: RayPending[int] = RayPending([building, role.answer.remote(2)], ["policy.train"] * 2, DEADLINE_S)
    with pytest.raises(DataError, match=r"^policy\.train: no such folder$"):
        pending.result()


@pytest.mark.parametrize("kind", [RecipeError, DataError, ResourceError, TrainingError, GuardError, RlhfError])
def test_our_errors_keep_class_and_exit_code(role, kind):
    error = failure(role.fail.remote(kind("the loss is not a number")))
    assert (type(error), str(error)) == (kind, "policy.train: the loss is not a number")
    assert error.exit_code == kind.exit_code
    assert error.__cause__ is not None


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ValueError("shapes differ"), "policy.train: ValueError: shapes differ"),
        (KeyError("loss"), "policy.train: KeyError: 'loss'"),
        (MemoryError(), "policy.train: MemoryError"),
        (RuntimeError("first line\nsecond\nthird"), "policy.train: RuntimeError: first line"),
    ],
)
def test_other_exceptions_become_training_errors_of_one_line(role, raised, expected):
    error = failure(role.fail.remote(raised))
    assert (type(error), str(error)) == (TrainingError, expected)


def test_exceptions_that_cannot_travel_are_told_all_the_same(role):
    for reference, cause in (
        (role.fail_in_two_parts.remote(), "TwoParts: this and that"),
        (role.fail_with_lock.remote(), "HoldsLock: the lock is held"),
    ):
        error = failure(reference)
        assert type(error) is TrainingError
        assert str(error).startswith("policy.train: ")
        assert str(error).endswith(cause)
        assert "\n" not in str(error)


def test_a_late_answer_is_an_error_at_the_deadline():
    actor = start()
    ray.get(actor.answer.remote(0), timeout=DEADLINE_S)
    error = failure(actor.sleep.remote(600), deadline_s=1.0)
    assert type(error) is LateProcess
    assert re.match(
        r"policy\.train gave no answer within 1 s \(ray\.call_timeout_s\) on [\d.]+, node [0-9a-f]{8}, pid \d+,"
        r" it held \d\.\d GiB, [\d.]+ of [\d.]+ GiB free; it hangs or waits for another process; ",
        str(error),
    )
    ray.kill(actor)


def test_the_rank_at_fault_is_named_and_not_the_one_that_lost_its_peer(local_ray):
    ranks = [start(), start()]
    ray.get([rank.answer.remote(0) for rank in ranks], timeout=DEADLINE_S)
    started = time.monotonic()
    lost = ranks[0].fail.remote(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    with pytest.raises(TrainingError, match=r"^policy-1\.train: ValueError: shapes differ$"):
        wait_for_all([lost, ranks[1].fail.remote(ValueError("shapes differ"))], NAMES, DEADLINE_S)
    lost = ranks[0].fail.remote(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    with pytest.raises(TrainingError, match=r"^policy-1\.train: the process died"):
        wait_for_all([lost, ranks[1].die.remote()], NAMES, DEADLINE_S)
    assert time.monotonic() - started < DEADLINE_S
    ray.kill(ranks[0])


def test_a_failed_rank_is_told_while_the_others_still_wait_for_it(local_ray, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE_S", 0.5)
    ranks = [start(), start()]
    ray.get([rank.answer.remote(0) for rank in ranks], timeout=DEADLINE_S)
    started = time.monotonic()
    with pytest.raises(DataError, match=r"^policy-1\.train: row 3$"):
        wait_for_all([ranks[0].sleep.remote(600), ranks[1].fail.remote(DataError("row 3"))], NAMES, DEADLINE_S)
    assert time.monotonic() - started < DEADLINE_S
    with pytest.raises(TrainingError, match=r"^policy-0\.train gave no answer within 1 s"):
        wait_for_all([ranks[0].sleep.remote(600), ranks[1].answer.remote(1)], NAMES, 1)
    for rank in ranks:
        ray.kill(rank)


def test_a_process_that_dies_is_told_at_once_and_ever_after(local_ray):
    actor = start()
    ray.get(actor.answer.remote(0), timeout=DEADLINE_S)
    waiting = actor.sleep.remote(600)
    dying = start()
    started = time.monotonic()
    ray.kill(actor)
    for reference in (waiting, actor.answer.remote(1), dying.die.remote()):
        error = failure(reference)
        assert type(error) is LostProcess
        assert str(error).startswith("policy.train: the process died (")
        assert "\n" not in str(error)
        assert len(str(error)) < 350
    assert time.monotonic() - started < DEADLINE_S


@pytest.mark.parametrize("kind", [RecipeError, ResourceError, GuardError])
def test_our_errors_in_a_constructor_keep_class_and_message(local_ray, kind):
    error = failure(start(kind("head_dim 16 is not supported\nuse 32")).answer.remote(1))
    assert (type(error), str(error)) == (kind, "policy.train: head_dim 16 is not supported\nuse 32")


def test_the_message_of_our_error_ends_where_another_exception_wraps_it(local_ray):
    error = failure(start(RecipeError("no such engine"), True).answer.remote(1))
    assert (type(error), str(error)) == (RecipeError, "policy.train: no such engine")


def test_other_exceptions_in_a_constructor_say_that_it_did_not_start(local_ray):
    error = failure(start(ImportError("no module named engine")).answer.remote(1))
    assert type(error) is TrainingError
    assert str(error) == "policy.train: the process could not start: ImportError: no module named engine"


CAUSES = [
    ("end", signal.SIGKILL, r"it ended without a word: SIGKILL or a crash", "out of memory is the usual cause: give"),
    ("end", signal.SIGSEGV, r"it crashed: SIGSEGV", "its last words are in logs/run.log"),
    ("end", signal.SIGTERM, r"it was ended from outside by SIGTERM", "see who or what ends processes"),
    ("leave", None, r"it ended itself with exit code 4", "its last words are in logs/run.log"),
]


@pytest.mark.parametrize(("method", "how", "cause", "remedy"), CAUSES)
def test_the_likely_cause_the_place_the_memory_and_a_remedy_are_told(local_ray, method, how, cause, remedy):
    actor = start()
    pid = ray.get(actor.pid.remote(), timeout=DEADLINE_S)
    error = failure(getattr(actor, method).remote(*([how] if how else [])))
    place = rf"on [\d.]+, node [0-9a-f]{{8}}, pid {pid}(, it held [\d.]+ GiB)?, [\d.]+ of [\d.]+ GiB free"
    assert re.match(rf"policy\.train: the process died \({cause}\) {place}; {remedy}", str(error)), str(error)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("The actor is dead because its node has died. Node Id: 12", "its machine was lost"),
        ("the actor's node was terminated unexpectedly: health check failed", "its machine was lost"),
        ("2 worker(s) were killed due to the node running low on memory. Usage 0.97", "Ray's memory monitor ended it"),
        ("The actor is dead because it was killed by `ray.kill`.", "it was ended through Ray"),
        ("Worker exit detail: Something new.", "Something new"),
    ],
)
def test_what_cannot_be_made_to_happen_here_is_told_by_rays_words(text, cause):
    assert death.told(OutOfMemoryError(text), None).startswith(f"({cause}")


def test_a_kill_by_the_kernel_is_told_where_it_counted_one(monkeypatch):
    counts = iter([3, 4, 4])
    monkeypatch.setattr(process, "_oom_kills", lambda: next(counts))
    monkeypatch.setattr(death, "KERNEL", process.KernelKills())
    error = OutOfMemoryError("Worker exit detail: a connection error code 2. End of file. Some common causes include")
    assert death.told(error, None).startswith("(the kernel's OOM killer ended it); give its role less")
    assert death.told(error, None).startswith("(it ended without a word")


def test_a_stopped_process_is_ended_too(local_ray):
    actor = start()
    pid = ray.get(actor.pid.remote(), timeout=DEADLINE_S)
    os.kill(pid, signal.SIGSTOP)
    process.end([actor])
    ends = time.monotonic() + DEADLINE_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < ends:
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
