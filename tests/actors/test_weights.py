"""Publishing weights to rollout engines in other processes: exact, acknowledged, bounded in time."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle
from rollout_oracle import differences, is_greedy, open_model, perturb, save, sharpen
from transformers import PreTrainedModel

from actors.rollout import RayRollout, Replica
from actors.weights import Publisher, publish
from rlhf.engines.base import RolloutSpec
from rlhf.engines.environment import vllm_environment
from rlhf.engines.served import ServedWeights
from rlhf.engines.shared_memory import Checksum, Outbox
from rlhf.errors import TrainingError
from rlhf.models.merging import merged_weights
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.role_schema import RolloutRole
from rlhf.types import Prompt, Sampling

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

DEADLINE_S = 120.0
SIXTEEN = Sampling(16)
PROMPTS = [Prompt(str(n), tuple(6 + (7 * i + n) % 256 for i in range(n)), "") for n in (5, 150, 9)]


def start(spec: RolloutSpec) -> Any:
    environment = vllm_environment(spec)
    return Replica.options(num_cpus=1, runtime_env={"env_vars": environment}).remote(spec)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(sharpen(open_model(tiny_folder)), tiny_folder, tmp_path_factory.mktemp("sharp") / "0")


@pytest.fixture(scope="module")
def replicas(local_ray: None, folder: Path) -> Iterator[list[Any]]:
    """One replica of each engine: both take their weights the same way."""
    spec = RolloutSpec(folder, "float32", RolloutRole(max_sequences=16), max_length=256, threads=1, seed=0)
    vllm = start(spec)
    transformers = start(replace(spec, role=RolloutRole(engine="transformers")))
    ray.get([vllm.ping.remote(), transformers.ping.remote()], timeout=DEADLINE_S)
    yield [vllm, transformers]
    ray.kill(vllm)
    ray.kill(transformers)


@pytest.fixture
def model(folder: Path) -> PreTrainedModel:
    """A policy that differs from what the engines began with."""
    return perturb(open_model(folder), seed=1, noise=0.5)


def generate(replica: Any, sampling: Sampling = SIXTEEN) -> list:
    return ray.get(replica.generate.remote(PROMPTS, sampling, [[1, 2]] * len(PROMPTS)), timeout=DEADLINE_S)


def test_every_engine_serves_and_acknowledges_what_was_published(replicas, model, folder):
    for version in (1, 2):
        perturb(model, seed=version, noise=0.5)
        checksum = Checksum()
        for item in merged_weights(model):
            checksum.add(*item)
        receipt = publish(lambda: merged_weights(model), replicas, version, DEADLINE_S)
        assert (receipt.version, receipt.checksum) == (version, checksum.hexdigest())
        assert receipt.bytes == sum(weight.nbytes for weight in model.parameters())
        for replica in replicas:
            rollouts = generate(replica)
            assert {rollout.policy_version for rollout in rollouts} == {version}
            assert differences(model, rollouts).max() < 5e-5
            assert differences(open_model(folder), rollouts).mean() > 0.1
            best = generate(replica, Sampling(16, temperature=0))[::2]
            assert all(is_greedy(model, rollout) for rollout in best)


def test_publishes_from_another_actor_and_loads_a_folder_back(replicas, folder, tmp_path):
    @ray.remote(num_cpus=1)
    def policy(handles: list[Any]) -> Any:
        policy_model = perturb(open_model(folder), seed=3, noise=0.5)
        return publish(lambda: merged_weights(policy_model), handles, 8, DEADLINE_S)

    receipt = ray.get(policy.remote(replicas), timeout=DEADLINE_S)
    loaded = save(perturb(open_model(folder), seed=3, noise=0.5), folder, tmp_path / "same")
    before = [generate(replica) for replica in replicas]
    again = RayRollout(replicas, DEADLINE_S).load(loaded, 8).result()
    assert (again.version, again.bytes) == (8, receipt.bytes)
    assert [generate(replica) for replica in replicas] == before


def test_prompts_are_dealt_out_and_come_back_in_order(replicas, model):
    publish(lambda: merged_weights(model), replicas, 3, DEADLINE_S)
    seeds = [[1, 2, 3], [4], [5, 6]]
    rollouts = RayRollout(replicas, DEADLINE_S).generate(PROMPTS, Sampling(8), seeds).result()
    assert [(rollout.prompt.id, rollout.seed) for rollout in rollouts] == [
        ("5", 1), ("5", 2), ("5", 3), ("150", 4), ("9", 5), ("9", 6),
    ]  # fmt: skip
    assert differences(model, rollouts).max() < 5e-5


def test_a_publisher_begins_anew_in_another_process():
    publisher = Publisher()
    publisher.replicas, publisher.outbox = [object()], Outbox()
    again = pickle.loads(cloudpickle.dumps(publisher.publish)).__self__
    publisher.forget()
    assert again is not publisher
    assert (again.replicas, again.outbox) == ([], None)


class StrangeReplica:
    """Has a replica's weight methods, and one flaw."""

    def __init__(self, flaw: str) -> None:
        self.flaw = flaw
        self.weights = ServedWeights()

    def transport(self) -> tuple[str, int]:
        return "shared_memory", 1

    def take_bucket(self, announcement: dict, first: bool, version: int | None, adapter: None) -> tuple[int, str]:
        if self.flaw == "hangs":
            time.sleep(600)
        if self.flaw == "dies":
            raise SystemExit
        if first:
            self.weights.begin()
        with self.weights.receiving(announcement):
            if self.flaw == "refuses":
                raise TrainingError("arrived with another checksum")
        if version is not None:
            self.weights.finish()
            self.weights.declare(version - 1 if self.flaw == "serves the old version" else version)
        return self.weights.version, "0000" if self.flaw == "received something else" else self.weights.ledger.checksum


@pytest.mark.parametrize(
    ("flaw", "deadline_s", "message"),
    [
        ("refuses", DEADLINE_S, r"rollout-1.update_weights: arrived with another checksum"),
        (
            "received something else",
            DEADLINE_S,
            r"rollout-1 acknowledged weights \(4, '0000'\), .*the policy sent \(4,",
        ),
        ("serves the old version", DEADLINE_S, r"rollout-1 acknowledged weights \(3, .*the policy sent \(4,"),
        ("hangs", 5.0, r"rollout-1.update_weights gave no answer within"),
        ("dies", DEADLINE_S, r"rollout-1.update_weights: the process died"),
    ],
)
def test_the_replica_at_fault_is_named(replicas, model, flaw, deadline_s, message):
    strange = ray.remote(StrangeReplica).options(num_cpus=0).remote(flaw)
    ray.get(strange.transport.remote(), timeout=DEADLINE_S)
    started = time.monotonic()
    with pytest.raises(TrainingError, match=message):
        publish(lambda: merged_weights(model), [replicas[0], strange], 4, deadline_s)
    assert time.monotonic() - started < DEADLINE_S
    ray.kill(strange)
    ray.get(replicas[0].served.remote(), timeout=DEADLINE_S)  # comes after what the publication sent
    rollouts = generate(replicas[0])
    assert {rollout.policy_version for rollout in rollouts} == {4}
    assert differences(model, rollouts).max() < 5e-5
    publish(lambda: merged_weights(model), replicas, 5, DEADLINE_S)
    assert differences(model, generate(replicas[0])).max() < 5e-5


def test_an_engine_that_slept_has_its_weights_and_waits_for_them_and_the_cache(replicas, model):
    engine = RayRollout(replicas, DEADLINE_S)
    engine.sleep().result()
    with pytest.raises(TrainingError, match="asleep: wake its weights"):
        publish(lambda: merged_weights(model), replicas, 7, DEADLINE_S)
    with pytest.raises(TrainingError, match="KV cache was woken before the weights"):
        engine.wake("kv_cache").result()
    engine.wake("weights").result()
    publish(lambda: merged_weights(model), replicas, 7, DEADLINE_S)
    for replica in replicas:
        with pytest.raises(TrainingError, match="cannot generate: it is asleep"):
            generate(replica)
    engine.wake("kv_cache").result()
    before = [generate(replica) for replica in replicas]
    engine.sleep().result()
    engine.wake("weights").result()
    engine.wake("kv_cache").result()
    assert [generate(replica) for replica in replicas] == before
    assert {rollout.policy_version for rollouts in before for rollout in rollouts} == {7}


def failing(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for index, item in enumerate(merged_weights(model)):
        if index == 7:
            raise MemoryError("merging")
        yield item


def test_a_policy_that_fails_before_its_first_bucket_leaves_the_last_weights_served(replicas, model):
    publish(lambda: merged_weights(model), replicas, 4, DEADLINE_S)
    with pytest.raises(MemoryError, match="merging"):
        publish(lambda: failing(model), replicas, 5, DEADLINE_S)
    for replica in replicas:
        rollouts = generate(replica)
        assert {rollout.policy_version for rollout in rollouts} == {4}
        assert differences(model, rollouts).max() < 5e-5


def test_a_policy_that_fails_half_way_leaves_nothing_served(replicas, model, monkeypatch):
    monkeypatch.setattr("actors.weights.Outbox", lambda: Outbox(16_000))
    with pytest.raises(MemoryError, match="merging"):
        Publisher().publish(lambda: failing(model), replicas, 6, DEADLINE_S)
    for replica in replicas:
        ray.get(replica.served.remote(), timeout=DEADLINE_S)  # comes after what the publication sent
        with pytest.raises(TrainingError, match="weight update is unfinished"):
            generate(replica)
    Publisher().publish(lambda: merged_weights(model), replicas, 6, DEADLINE_S)  # in many buckets
    assert differences(model, generate(replicas[0])).max() < 5e-5


@pytest.mark.real_model
def test_a_real_model_agrees_after_an_update(local_ray, real_folder):
    role = RolloutRole(max_sequences=16)
    replica = start(RolloutSpec(real_folder, "float32", role, max_length=512, threads=1, seed=0))
    model = perturb(open_model(real_folder), seed=1)
    tokenizer = load_tokenizer(real_folder)
    questions = ["What is rain?", "Name a fruit.", "Who are you?", "Count to five.", "Is tea warm?", "Say hello."]
    questions += ["Repeat: " + "the old town was quiet and grey. " * times for times in (18, 25)]
    prompts = [
        Prompt(question[:20], tuple(tokenizer.prompt_ids([{"role": "user", "content": question}])), question)
        for question in questions
    ]
    assert sum(len(prompt.tokens) > 128 for prompt in prompts) == 2

    def best() -> list:
        return ray.get(replica.generate.remote(prompts, Sampling(12, temperature=0), [[0]] * 8), timeout=DEADLINE_S)

    best()  # fills the prefix cache with keys of the old weights
    receipt = publish(lambda: merged_weights(model), [replica], 1, DEADLINE_S)
    assert receipt.bytes == 134_515_008 * 4
    rollouts = best()
    assert differences(model, rollouts).max() < 1e-4
    assert all(is_greedy(model, rollout) for rollout in rollouts)
    ray.kill(replica)
