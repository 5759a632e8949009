"""Prompts to replicas as these become free: balanced, bounded, in order, failures named; and calls in one engine."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ray
from replicas_made import PROMPTS, SAMPLING, SEEDS, Actor, Threaded, expected

from actors.balance import Balance
from actors.dispatch import Dispatch
from actors.objects import Asked
from actors.rollout import RayRollout
from rlhf.engines.gate import Gate
from rlhf.engines.vllm_batch import SharedBatch
from rlhf.errors import GuardError, LostProcess, TrainingError
from rlhf.types import Sampling

DEADLINE_S = 60.0


def dispatch(replicas: list[Any], max_sequences: int = 4, deadline_s: float = DEADLINE_S) -> Dispatch:
    balance = Balance(len(replicas), max_sequences)
    return Dispatch(replicas, balance, PROMPTS, SAMPLING, SEEDS, deadline_s, "rollout")


def test_prompts_go_where_the_fewest_tokens_are_and_stop_where_there_is_no_room():
    balance = Balance(2, max_sequences=2)  # room for 4 sequences each
    assert [balance.take(10, 2), balance.take(30, 2), balance.take(15, 1)] == [0, 1, 0]
    assert balance.tokens == [25, 30]
    assert balance.take(8, 1) == 0  # 25 < 30; now it has 4 sequences
    assert balance.take(1, 2) == 1
    assert balance.take(1, 1) is None
    balance.give_back(0, 10, 2, [3, 5])
    assert (balance.tokens, balance.sequences) == ([23, 31], [2, 4])
    assert balance.take(1, 1) == 0
    assert balance.expected(Sampling(16)) == 4.0
    assert balance.expected(Sampling(3)) == 3


def test_an_idle_replica_takes_more_samples_than_it_has_room_for():
    balance = Balance(1, max_sequences=1)
    assert balance.take(5, 100) == 0
    assert balance.take(5, 1) is None
    balance.give_back(0, 5, 100)
    assert (balance.take(5, 100), balance.tokens) == (0, [5])


def test_the_order_of_replicas_stays_small_over_many_calls():
    balance = Balance(3, max_sequences=4)
    for turn in range(5000):
        replica = balance.take(1 + turn % 7, 2)
        assert replica is not None
        balance.give_back(replica, 1 + turn % 7, 2, [1, 2])
    assert len(balance.order) <= 24
    assert balance.expected(SAMPLING) == 1.5


def test_a_closed_replica_gets_nothing_and_its_failure_reaches_who_waits():
    balance = Balance(2, max_sequences=1)
    assert balance.take(5, 1) == 0
    balance.close(0)
    assert [balance.take(9, 2), balance.take(1, 1)] == [1, None]
    balance.give_back(0, 5, 1)
    assert balance.take(1, 1) is None
    threading.Timer(0.2, balance.open, [0]).start()
    assert balance.wait_for_room(0.05)  # no time passes while one is closed
    assert (balance.take(1, 1), balance.tokens) == (0, [1, 9])
    balance.fail(TrainingError("gone for good"))
    for wait in (lambda: balance.take(1, 1), lambda: balance.wait_for_room(1)):
        with pytest.raises(TrainingError, match="gone for good"):
            wait()


def test_a_pause_waits_until_no_replica_is_at_work():
    balance = Balance(2, max_sequences=4)
    balance.take(5, 1)
    assert not balance.pause(0.01)
    assert balance.take(1, 1) is None
    balance.give_back(0, 5, 1)
    assert balance.pause(0.01)
    balance.resume()
    assert balance.take(1, 1) == 0


@pytest.mark.parametrize("replicas", [1, 3])
def test_the_result_is_in_order_whatever_the_timing(replicas):
    waits = [Threaded(lambda prompt, slow=slow: 0.001 * ((int(prompt.id[1:]) * slow) % 7)) for slow in (3, 5, 2)]
    rollouts = dispatch(waits[:replicas]).result()
    assert rollouts == expected()
    assert rollouts[3].prompt is PROMPTS[1]
    drawn = [prompt for replica in waits for prompt in replica.prompts]
    assert sorted(drawn) == sorted(prompt.id for prompt in PROMPTS)


def test_replicas_stay_filled_to_their_room_and_fast_ones_do_more():
    fast, slow = Threaded(lambda _: 0.002), Threaded(lambda _: 0.05)
    dispatch([fast, slow]).result()
    assert (fast.most, slow.most) == (8, 8)
    assert len(fast.prompts) > 3 * len(slow.prompts)


def test_what_fits_at_once_is_one_call_a_replica():
    replicas = [Threaded(lambda _: 0.001) for _ in range(2)]
    assert dispatch(replicas, max_sequences=20).result() == expected()
    assert [len(replica.sizes) for replica in replicas] == [1, 1]


def test_prompts_are_sent_while_nobody_waits():
    replica = Threaded(lambda _: 0.001)
    pending = dispatch([replica])
    ends = time.monotonic() + 20
    while len(replica.prompts) < len(PROMPTS) and time.monotonic() < ends:
        time.sleep(0.01)
    assert len(replica.prompts) == len(PROMPTS)
    assert pending.result() == expected()


def test_a_stopped_call_sends_no_more():
    replica = Threaded(lambda _: 0.05)
    pending = dispatch([replica])
    pending.stop()
    with pytest.raises(TrainingError, match=r"^rollout\.generate was given up$"):
        pending.result()
    assert len(replica.prompts) <= 8


def test_no_prompts_no_rollouts():
    assert Dispatch([Threaded(lambda _: 0)], Balance(1, 4), [], SAMPLING, [], DEADLINE_S, "rollout").result() == []


@pytest.mark.ray
def test_replicas_in_processes_draw_what_one_process_would(local_ray):
    actors = [ray.remote(Actor).options(num_cpus=0).remote() for _ in range(2)]
    engine = RayRollout(actors, DEADLINE_S, max_sequences=4)
    first, second = (engine.generate(PROMPTS, SAMPLING, SEEDS) for _ in range(2))
    assert second.result() == first.result() == expected()
    assert engine.balance.tokens == [0, 0]
    for actor in actors:
        ray.kill(actor)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("fault", "deadline_s", "kind", "told"),
    [
        ("raises", DEADLINE_S, GuardError, r"^rollout-1\.generate: the weights are gone$"),
        ("dies", DEADLINE_S, LostProcess, r"^rollout-1\.generate: the process died"),
        (
            "hangs",
            4.0,
            LostProcess,
            r"^rollout-1\.generate gave no answer within 4 s \(ray\.call_timeout_s\) on .*; it hangs",
        ),
    ],
)
def test_a_failed_replica_is_named(local_ray, fault, deadline_s, kind, told):
    actors = [ray.remote(Actor).options(num_cpus=0).remote(fault if row == 1 else "") for row in range(2)]
    warm_up = Dispatch(actors[:1], Balance(1, 4), PROMPTS[:1], SAMPLING, SEEDS[:1], DEADLINE_S, "rollout")
    warm_up.result()
    ray.get([actor.draw.remote(Asked.of([], SAMPLING, [])) for actor in actors], timeout=DEADLINE_S)
    started = time.monotonic()
    with pytest.raises(kind, match=told):
        dispatch(actors, deadline_s=deadline_s).result()
    assert time.monotonic() - started < DEADLINE_S
    for actor in actors:
        ray.kill(actor)


class Engine:
    """Stands for vLLM's engine: a request takes as many steps as its prompt has tokens."""

    def __init__(self, fails_at: int = 0) -> None:
        self.left: dict[str, int] = {}
        self.steps = 0
        self.together = 0
        self.fails_at = fails_at
        self.threads: set[int] = set()

    def add_request(self, number: str, prompt: Any, parameters: Any, lora_request: Any = None) -> str:
        if parameters == "refused":
            raise ValueError("no such parameter")
        self.left[number] = len(prompt["prompt_token_ids"])
        return number

    def abort_request(self, numbers: list[str], internal: bool) -> None:
        for number in numbers:
            del self.left[number]

    def step(self) -> list[Any]:
        self.threads.add(threading.get_ident())
        self.steps += 1
        time.sleep(0.002)
        if self.steps == self.fails_at:
            raise RuntimeError("out of memory\nsecond line")
        self.together = max(self.together, len(self.left))
        self.left = {number: left - 1 for number, left in self.left.items()}
        ended = [number for number, left in self.left.items() if left == 0]
        for number in ended:
            del self.left[number]
        return [Output(number) for number in ended]


class Output:
    finished = True

    def __init__(self, number: str) -> None:
        self.request_id = number


def at_once(batch: SharedBatch, calls: list[list[int]], parameters: list[str]) -> list[Any]:
    """Return what each of several threads got, or what it raised; a call is the lengths of its prompts."""

    def one(number: int) -> Any:
        prompts = [[0] * length for length in calls[number]]
        try:
            return [output.request_id for output in batch.generate(prompts, [parameters[number]] * len(prompts))]
        except TrainingError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=20) for future in [pool.submit(one, number) for number in range(len(calls))]]


def test_calls_of_several_threads_run_in_one_batch_and_get_their_own_back():
    engine = Engine()
    answers = at_once(SharedBatch(engine), [[30, 5], [40], [], [20, 20, 20]], [""] * 4)  # type: ignore[arg-type]
    assert [len(answer) for answer in answers] == [2, 1, 0, 3]
    assert sorted(number for answer in answers for number in answer) == [str(number) for number in range(6)]
    assert len(engine.threads) == 1
    assert engine.together > 3


def test_a_refused_request_ends_its_call_alone():
    engine = Engine()
    answers = at_once(SharedBatch(engine), [[5, 5], [9, 9]], ["", "refused"])  # type: ignore[arg-type]
    assert len(answers[0]) == 2
    assert answers[1] == "vLLM failed: ValueError: no such parameter"
    assert not engine.left


def test_a_failed_step_ends_every_call_and_all_later_ones():
    batch = SharedBatch(Engine(fails_at=10))  # type: ignore[arg-type]
    assert at_once(batch, [[50], [60, 70], [80]], [""] * 3) == ["vLLM failed: RuntimeError: out of memory"] * 3
    assert at_once(batch, [[1]], [""]) == ["vLLM failed earlier: RuntimeError: out of memory"]


def test_an_update_waits_for_those_inside_and_nobody_enters_after_it():
    serving = True

    def check() -> None:
        if not serving:
            raise TrainingError("a weight update is unfinished")

    gate, left = Gate(check), threading.Event()

    def generate() -> None:
        with gate.passing():
            entered.set()
            time.sleep(0.2)
            left.set()

    entered = threading.Event()
    thread = threading.Thread(target=generate)
    thread.start()
    entered.wait()
    serving = False
    with pytest.raises(TrainingError, match="unfinished"), gate.passing():
        pass
    gate.drain()
    assert left.is_set()
    thread.join()
