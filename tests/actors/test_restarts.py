"""Lost processes are replaced in place: no prompt is lost or doubled, the weights are right, and there is an end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from replicas_made import PROMPTS, SAMPLING, SEEDS, Hanging, Number, Server, drawn_with, expected

from actors.dispatch import CALLS, Dispatch
from actors.group import RankGroup
from actors.learner import LearnerActor, RayModel
from actors.process import end
from actors.restarts import Restarts
from actors.rollout import RayRollout, Replica
from actors.turns import SharingRollout, Turns
from actors.worker import learner_environment
from rlhf.data.collate import collate_rollouts
from rlhf.engines.base import LearnerSpec, RolloutSpec
from rlhf.errors import LostProcess, TrainingError
from rlhf.recipe.base import Optimizer
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.tuning_schema import Full, Lora
from rlhf.types import Prompt, Rollout, Sampling

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

DEADLINE_S = 60.0
BATCH = collate_rollouts(expected()[:4], 0)
Start = Callable[[int], Any]


def server(_: int = 0) -> Any:
    return ray.remote(concurrency_groups={"generate": CALLS})(Server).options(num_cpus=0).remote()


def number(_: int = 0) -> Any:
    return ray.remote(Number).options(num_cpus=0).remote()


def spec(trained: bool, folder: Path = Path("model"), seed: int = 0, kind: Any = "causal") -> LearnerSpec:
    optimizer = Optimizer(learning_rate=0.01) if trained else None
    tuning = Full() if trained else None
    return LearnerSpec("policy", kind, folder, "float32", tuning, optimizer, None, 4096, 1.0, 1, seed)


def policy() -> RayModel:
    group = RankGroup("policy", [number()], DEADLINE_S, lambda: [number()], Restarts("policy", 3))
    group.build(spec(trained=True))
    return RayModel(group)


def two_replicas(start: Start, deadline_s: float, allowed: int, turns: Turns | None = None) -> Any:
    """Return an engine whose replicas may be replaced."""
    replicas, restarts = [start(0), start(1)], Restarts("rollout", allowed)
    ray.get([replica.ping.remote() for replica in replicas], timeout=DEADLINE_S)
    if turns is None:
        return RayRollout(replicas, deadline_s, "rollout", 4, start, restarts)
    return SharingRollout(replicas, deadline_s, turns, 4, start, restarts)


@pytest.fixture(scope="module")
def replaceable(local_ray: None) -> Iterator[Any]:
    """An engine of fakes for many tests; each loads the weights that it wants."""
    engine = two_replicas(server, DEADLINE_S, allowed=100)
    yield engine
    engine.kill()


@pytest.fixture
def engine(replaceable: Any) -> Any:
    replaceable.load(Path("7"), 5).result()
    replaceable.repairs.restarts.used = 0
    return replaceable


@pytest.fixture(scope="module")
def model(local_ray: None) -> Iterator[RayModel]:
    """A fake policy, for many tests."""
    made = policy()
    yield made
    made.group.kill()


def signalled(replica: Any, how: int) -> None:
    os.kill(ray.get(replica.ping.remote(), timeout=DEADLINE_S), how)


def under_way(call: Dispatch) -> Dispatch:
    """Return a call when some of its prompts are drawn and some are not."""
    ends = time.monotonic() + DEADLINE_S
    while not call.drawn and time.monotonic() < ends:
        time.sleep(0.002)
    assert 0 < len(call.drawn) < len(call.prompts)
    return call


def served(weights: float, version: int) -> list[Rollout]:
    return [drawn_with(weights, version, p, seed) for p, row in zip(PROMPTS, SEEDS, strict=True) for seed in row]


@pytest.mark.parametrize(
    ("how", "deadline_s", "told"),
    [
        (signal.SIGKILL, DEADLINE_S, "rollout-1.generate: the process died (it ended without a word"),
        (signal.SIGSTOP, 3.0, "rollout-1.generate gave no answer within 3 s"),
    ],
)
def test_the_prompts_of_a_lost_replica_are_drawn_again(engine, caplog, how, deadline_s, told):
    replicas = engine.current()
    engine.deadline_s = deadline_s
    call = under_way(engine.generate(PROMPTS, SAMPLING, SEEDS))
    engine.deadline_s = DEADLINE_S
    with caplog.at_level(logging.WARNING, "rlhf"):
        signalled(replicas[1], how)
        rollouts = call.result()
        assert engine.repairs.settled()
    assert rollouts == served(7.0, 5)
    assert Counter(rollout.seed for rollout in rollouts) == Counter(seed for row in SEEDS for seed in row)
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(told)
    assert warning.endswith("; restarted (1 of 100)")
    assert engine.replicas[0] is replicas[0]
    assert engine.replicas[1] is not replicas[1]
    assert engine.generate(PROMPTS, SAMPLING, SEEDS).result() == served(7.0, 5)
    assert (engine.balance.tokens, engine.balance.sequences, engine.balance.closed) == ([0, 0], [0, 0], set())


def test_healthy_replicas_go_on_while_one_is_replaced(engine):
    other, lost = engine.current()
    signalled(lost, signal.SIGKILL)
    started = time.monotonic()
    call = engine.generate(PROMPTS, SAMPLING, SEEDS)
    while len(call.drawn) < 16 and time.monotonic() < started + DEADLINE_S:
        time.sleep(0.01)
    assert engine.repairs.under_way
    assert call.result() == served(7.0, 5)
    assert engine.repairs.settled()
    assert engine.replicas[0] is other


def test_all_replicas_lost_at_once_are_replaced(engine):
    call = under_way(engine.generate(PROMPTS, SAMPLING, SEEDS))
    for replica in engine.current():
        signalled(replica, signal.SIGKILL)
    assert call.result() == served(7.0, 5)
    assert engine.repairs.settled()
    assert engine.repairs.restarts.used == 2


def test_a_new_replica_serves_what_was_published_last(engine, model):
    model.train(BATCH, None, [[0]], 1.0).result()
    weights = float(model.publish(engine, 1).result().checksum)
    assert weights >= 1
    call = under_way(engine.generate(PROMPTS, SAMPLING, SEEDS))
    signalled(engine.replicas[0], signal.SIGKILL)
    assert call.result() == served(weights, 1)
    assert engine.repairs.settled()
    assert engine.generate(PROMPTS, SAMPLING, SEEDS).result() == served(weights, 1)


def test_a_policy_trained_meanwhile_gives_its_weights_as_the_version_that_comes_next(engine, model):
    weights = float(model.publish(engine, 4).result().checksum)
    ahead = engine.generate(PROMPTS, SAMPLING, SEEDS)
    learning = model.train(BATCH, None, [[0]], 1.0)
    signalled(engine.replicas[0], signal.SIGKILL)
    learning.result()
    rollouts = ahead.result()
    assert Counter(rollout.seed for rollout in rollouts) == Counter(seed for row in SEEDS for seed in row)
    drawn = {(rollout.policy_version, -rollout.logprobs[0]) for rollout in rollouts}
    assert {(4, weights)} < drawn | {(5, weights + 1)} == {(4, weights), (5, weights + 1)}
    assert engine.repairs.settled()
    assert [ray.get(replica.served.remote()) for replica in engine.replicas] == [(weights + 1, 5), (weights, 4)]
    assert model.publish(engine, 5).result().version == 5
    assert engine.generate(PROMPTS, SAMPLING, SEEDS).result() == served(weights + 1, 5)


@pytest.mark.parametrize("act", ["load", "publish"])
def test_a_replica_lost_between_generations_is_replaced_and_the_call_made_again(engine, model, act):
    end(engine.replicas[:1])
    receipt = (engine.load(Path("3"), 2) if act == "load" else model.publish(engine, 2)).result()
    assert engine.generate(PROMPTS, SAMPLING, SEEDS).result() == served(float(receipt.checksum), 2)
    assert engine.repairs.restarts.used == 1


def test_a_publication_fails_when_the_policy_is_lost_and_no_replica(engine):
    lost = policy()
    lost.publish(engine, 1).result()
    end(lost.group.ranks)
    with pytest.raises(LostProcess, match=r"^policy\.publish: the process died"):
        lost.publish(engine, 2).result()
    assert engine.repairs.restarts.used == 0
    assert engine.alive()


def test_an_engine_on_shared_devices_comes_to_rest_before_a_replica_is_replaced(model):
    turns = Turns()
    turns.join(model.group)
    turns.begin()
    engine = two_replicas(server, DEADLINE_S, 3, turns)
    turns.began(engine)
    weights = float(model.publish(engine, 1).result().checksum)
    call = under_way(engine.generate(PROMPTS, SAMPLING, SEEDS))
    signalled(engine.replicas[0], signal.SIGKILL)
    assert call.result() == served(weights, 1)
    assert engine.repairs.settled()
    assert not turns.models_here
    model.train(BATCH, None, [[0]], 1.0).result()
    model.publish(engine, 2).result()
    assert engine.generate(PROMPTS, SAMPLING, SEEDS).result() == served(weights + 1, 2)
    model.group.before_call = lambda: None
    engine.kill()


def test_there_is_an_end_to_restarts(local_ray):
    def short_lived(index: int) -> Any:
        replica = server()
        started.append(index)
        if len(started) > 2:
            end([replica])
        return replica

    started: list[int] = []
    engine = two_replicas(short_lived, DEADLINE_S, allowed=2)
    call = under_way(engine.generate(PROMPTS, SAMPLING, SEEDS))
    signalled(engine.replicas[1], signal.SIGKILL)
    told = (
        r"^rollout-1\.start: the process died .*; rollout was restarted 2 times before, no more is allowed \(recovery"
    )
    with pytest.raises(TrainingError, match=told) as caught:
        call.result()
    assert not isinstance(caught.value, LostProcess)
    assert len(str(caught.value).splitlines()) == 1
    assert started == [0, 1, 1, 1]
    assert not engine.alive()
    with pytest.raises(TrainingError, match=told):
        engine.generate(PROMPTS, SAMPLING, SEEDS)
    engine.kill()


def test_prompts_that_are_late_on_a_second_replica_too_end_the_call(local_ray):
    def start(_: int) -> Any:
        return ray.remote(concurrency_groups={"generate": CALLS})(Hanging).options(num_cpus=0).remote()

    engine = two_replicas(start, 4.0, allowed=10)
    told = r"^rollout-\d\.generate gave no answer within 4 s \(ray\.call_timeout_s\).*; that was the second time"
    with pytest.raises(TrainingError, match=told) as caught:
        engine.generate(PROMPTS, SAMPLING, SEEDS).result()
    assert not isinstance(caught.value, LostProcess)
    assert engine.repairs.restarts.used == 1
    engine.kill()


def test_a_repair_that_takes_too_long_is_no_error_of_its_own(local_ray, caplog, monkeypatch):
    monkeypatch.setattr("actors.repairs.SAY_S", 0.1)
    engine = two_replicas(server, DEADLINE_S, allowed=3)
    held = threading.Event()
    monkeypatch.setattr(engine.repairs, "supply", lambda index: held.wait(60))
    engine.repairs.start_s = 0.5
    repair = engine.repairs.begin(0, engine.replicas[0], LostProcess("rollout-0.generate: the process died"))
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert not engine.alive()
    assert "waiting for the repair of replica 0" in caplog.text
    assert "the repair of replica 0 has not ended within" in caplog.text
    held.set()
    repair.result(timeout=60)
    engine.kill()


def test_where_none_is_allowed_the_loss_is_told_as_it_is():
    loss = LostProcess("rollout-1.generate: the process died")
    with pytest.raises(LostProcess) as caught:
        Restarts("rollout", 0).spend(loss)
    assert caught.value is loss


def test_a_frozen_group_that_hangs_is_replaced_and_asked_again(local_ray):
    def start() -> list[Any]:
        return [number(), number()]

    group = RankGroup("reward", start(), DEADLINE_S, start, Restarts("reward", 1))
    group.build(spec(trained=False, seed=9))
    pids = group.wait("build", group.spec)
    before = group.ask("scores", list, BATCH).result()
    group.deadline_s = 4.0
    asked = [group.ask("scores", list, BATCH) for _ in range(2)]
    os.kill(pids[1], signal.SIGSTOP)
    assert [call.result() for call in asked] == [before, before]
    assert before == [9 + float(BATCH.tokens.sum())] * 2
    assert group.restarts.used == 1
    end(group.ranks[:1])
    with pytest.raises(TrainingError, match=r"^reward-0\.scores: the process died .*; reward was restarted 1 times"):
        group.ask("scores", list, BATCH).result()
    group.kill()


def test_a_trained_group_is_not_replaced_but_one_without_a_model_is(local_ray):
    trained = policy()
    training = trained.train(BATCH, None, [[0]], 1.0)
    end(trained.group.ranks)
    with pytest.raises(LostProcess, match=r"^policy\.train: the process died"):
        training.result()
    assert trained.group.restarts.used == 0
    trained.group.drop()
    assert trained.group.restarts.used == 1
    trained.group.kill()


QUESTIONS = [Prompt(f"q{n}", tuple(6 + (7 * i + n) % 256 for i in range(3 + n % 9)), "") for n in range(24)]
DRAWS = [[100 * n, 100 * n + 1] for n in range(24)]


def test_real_models_give_what_they_give_undisturbed(local_ray, tiny_folder):
    """Float32 transformers engine: bitwise, with the published weights in the replica that takes a lost one's place."""
    rollout = RolloutSpec(tiny_folder, "float32", RolloutRole(engine="transformers"), 128, threads=1, seed=0)
    here = {"num_cpus": 0, "runtime_env": {"env_vars": learner_environment()}}
    group = RankGroup("policy", [ray.remote(LearnerActor).options(**here).remote()], DEADLINE_S)
    group.build(replace(spec(True, tiny_folder, seed=3), tuning=Lora(r=4, alpha=8)))
    tuned, engine = RayModel(group), two_replicas(lambda _: Replica.options(**here).remote(rollout), DEADLINE_S, 3)
    tuned.publish(engine, 1).result()
    undisturbed = engine.generate(QUESTIONS, Sampling(48), DRAWS).result()
    call = under_way(engine.generate(QUESTIONS, Sampling(48), DRAWS))
    signalled(engine.replicas[0], signal.SIGKILL)
    assert call.result() == undisturbed
    assert engine.repairs.settled()
    assert engine.generate(QUESTIONS, Sampling(48), DRAWS).result() == undisturbed
    assert len({tuple(ray.get(replica.served.remote())) for replica in engine.replicas}) == 1
    for held in (engine, group):
        held.kill()
