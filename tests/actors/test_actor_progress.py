"""A call may take longer than its deadline while its process makes progress, and not a moment longer otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.experimental import internal_kv

from actors import progress
from actors.balance import Balance
from actors.progress import NAMESPACE, Watch, actor_of, forget_job, id_of, tell_progress
from actors.supervise import Retried, wait_for, wait_for_all
from rlhf.errors import LateProcess, LostProcess, TrainingError
from rlhf.pulse import PULSE

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

DEADLINE_S = 8.0
WORK_S = 17.0
START_S = 300.0
"""A process imports its libraries, which takes long on a busy machine."""


class Worker:
    """Tells its progress often."""

    def __init__(self, starts_s: float = 0.0) -> None:
        progress.REPORT_S = 0.2
        tell_progress()
        self.work(starts_s)

    def pid(self) -> int:
        return os.getpid()

    def work(self, seconds: float, beats: bool = True) -> float:
        PULSE.begin("policy.train")
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if beats:
                PULSE.beat()
            time.sleep(0.05)
        return seconds

    def wait_for(self, other: list[Any], seconds: float, beats: bool) -> float:
        """Wait for another worker, with a deadline that is a little shorter than the caller's."""
        return wait_for(other[0].work.remote(seconds, beats), "rollout-0.draw", 0.8 * DEADLINE_S)


def start(*arguments: Any) -> Any:
    return ray.remote(Worker).options(num_cpus=0).remote(*arguments)


@pytest.fixture(scope="module")
def workers(local_ray: None) -> Iterator[list[Any]]:
    made = [start(), start(), start()]
    ray.get([worker.pid.remote() for worker in made], timeout=START_S)
    yield made
    for worker in made:
        ray.kill(worker)


def test_calls_that_make_progress_outlast_their_deadline_and_a_new_process_its_start(workers: list[Any]) -> None:
    """All at once, as each takes long: a plain call, one that waits for another process, and a slow start."""
    slow, watch = start(WORK_S), Watch()
    ends = time.monotonic() + START_S
    while id_of(slow) not in watch.beats and time.monotonic() < ends:  # its libraries are imported without a word
        watch.look([id_of(slow)])
        time.sleep(0.1)
    calls = [workers[0].work.remote(WORK_S), workers[1].wait_for.remote(workers[2:], WORK_S, True), slow.pid.remote()]
    values = wait_for_all(calls, ["policy.train", "policy.publish", "rollout-0.start"], DEADLINE_S)
    assert values[:2] == [WORK_S, WORK_S]
    ray.kill(slow)


def test_a_call_without_progress_is_late_though_its_process_lives_and_another_works(workers: list[Any]) -> None:
    stuck = start()
    ray.get(stuck.pid.remote(), timeout=START_S)
    calls = [workers[0].work.remote(WORK_S), stuck.work.remote(600, False)]
    with pytest.raises(LateProcess) as caught:
        wait_for_all(calls, ["policy-0.train", "policy-1.train"], DEADLINE_S)
    said = str(caught.value)
    assert said.startswith("policy-1.train gave no answer within 8 s (ray.call_timeout_s) on ")
    assert "and was last at: policy.train; if one piece of the work takes that long, raise ray.call_timeout_s" in said
    assert caught.value.call == "policy.train"
    ray.kill(stuck)
    wait_for(calls[0], "policy-0.train", DEADLINE_S)


def test_who_waits_for_a_process_that_hangs_names_it_before_its_own_caller_gives_up(workers: list[Any]) -> None:
    stuck = start()
    ray.get(stuck.pid.remote(), timeout=START_S)
    with pytest.raises(LateProcess, match=r"^policy\.publish: rollout-0\.draw gave no answer within 6 s"):
        wait_for(workers[0].wait_for.remote([stuck], 600, False), "policy.publish", DEADLINE_S)
    ray.kill(stuck)


def test_what_a_run_has_told_is_removed_at_its_end(workers: list[Any]) -> None:
    watch = Watch()
    call = workers[0].work.remote(0.5)
    ray.get(call, timeout=START_S)
    assert actor_of(call) == id_of(workers[0])
    ends = time.monotonic() + 30
    while not watch.look([id_of(workers[0])]) and time.monotonic() < ends:
        ray.get(workers[0].work.remote(0.5), timeout=START_S)
    assert watch.doing[id_of(workers[0])] == "policy.train"
    job = f"pulse/{ray.get_runtime_context().get_job_id()}/"
    assert internal_kv._internal_kv_list(job, namespace=NAMESPACE)
    for worker in workers:
        ray.kill(worker)
    time.sleep(1)
    forget_job()
    assert not internal_kv._internal_kv_list(job, namespace=NAMESPACE)


class Asked:
    """Processes whose call ends as a script says; each loss is mended."""

    def __init__(self, *script: Exception | int) -> None:
        self.script = iter(script)
        self.mended = 0

    def current(self) -> tuple[Any, ...]:
        return ()

    def mend(self, asked: tuple[Any, ...], error: LostProcess) -> None:
        self.mended += 1

    def result(self) -> int:
        outcome = next(self.script)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def test_a_call_that_is_late_twice_is_not_tried_a_third_time() -> None:
    late, lost = LateProcess("reward.scores gave no answer; raise ray.call_timeout_s"), LostProcess("it died")
    asked = Asked(lost, late, late, 7)
    with pytest.raises(TrainingError, match=r"raise ray\.call_timeout_s; that was the second time in the same place"):
        Retried(asked, lambda: asked).result()
    assert asked.mended == 2
    asked = Asked(lost, late, lost, 7)
    assert Retried(asked, lambda: asked).result() == 7


def test_an_engine_without_room_is_waited_for_while_calls_end_or_replicas_work() -> None:
    balance = Balance(1, 1)
    assert balance.take(1, 2) == 0
    works = iter([True] * 5)
    assert not balance.wait_for_room(0.2, lambda: next(works, False))
    assert next(works, None) is None
    assert not balance.pause(0.2)
    balance.give_back(0, 1, 2)
    assert balance.pause(0.2)
    balance.resume()
    assert balance.wait_for_room(0.2)
