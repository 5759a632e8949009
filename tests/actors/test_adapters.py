"""Publishing a policy's adapter alone: vLLM then generates as the policy does, adapters unmerged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from peft import PeftModel
from rollout_oracle import differences, is_greedy, open_model, perturb, save, sharpen
from torch import Tensor

from actors.rollout import RayRollout, Replica
from actors.weights import publish
from rlhf.engines.adapter import adapter_settings
from rlhf.engines.base import RolloutSpec
from rlhf.engines.environment import vllm_environment
from rlhf.errors import RecipeError
from rlhf.models.adapter import adapter_config, adapter_weights
from rlhf.models.loading import load_causal
from rlhf.models.merging import merged_weights
from rlhf.models.quantised import keep_packing, quantisation
from rlhf.models.tuning import apply_tuning, trainable_parameters
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.tuning_schema import Ia3, Lora, Qlora, Tuning
from rlhf.types import Prompt, Sampling

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

DEADLINE_S = 240.0
# The second is longer than a block of the KV cache.
PROMPTS = [Prompt(str(n), tuple(6 + (7 * i + n) % 256 for i in range(n)), "") for n in (5, 150, 9)]
ROLE = RolloutRole(max_sequences=16, weights="adapter")
LORA = Lora(r=4, alpha=10)


class Policy:
    """An adapted policy with the methods that `publish` needs."""

    def __init__(self, folder: Path, seed: int, tuning: Tuning = LORA) -> None:
        model = load_causal(folder, "float32", **quantisation(tuning, "float32"))
        keep_packing(model)
        self.model: PeftModel = apply_tuning(model, tuning, seed).eval()
        self.change(seed)

    @torch.no_grad()
    def change(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in trainable_parameters(self.model):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        return adapter_weights(self.model)

    def adapter_config(self) -> dict[str, Any]:
        return adapter_config(self.model)

    def publish(self, replica: Any, version: int) -> Any:
        return publish(lambda: merged_weights(self.model), [replica], version, DEADLINE_S, adapter=self)


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    first = save(sharpen(open_model(tiny_folder)), tiny_folder, root / "0")
    return [first, save(perturb(open_model(first), 1, 0.5), first, root / "1")]


@pytest.fixture(scope="module")
def replica(local_ray: None, folders: list[Path]) -> Iterator[Any]:
    spec = RolloutSpec(folders[0], "float32", ROLE, max_length=256, threads=1, seed=0, lora=LORA)
    replica = Replica.options(num_cpus=1, runtime_env={"env_vars": vllm_environment(spec)}).remote(spec)
    ray.get(replica.ping.remote(), timeout=DEADLINE_S)
    yield replica
    ray.kill(replica)


def agrees(replica: Any, model: Any, version: int) -> None:
    for sampling, seeds in ((Sampling(16), [[1, 2]] * 3), (Sampling(16, temperature=0), [[0]] * 3)):
        rollouts = ray.get(replica.generate.remote(PROMPTS, sampling, seeds), timeout=DEADLINE_S)
        assert {rollout.policy_version for rollout in rollouts} == {version}
        assert differences(model, rollouts).max() < 1e-4
        assert sampling.temperature or all(is_greedy(model, rollout) for rollout in rollouts)


def test_each_published_adapter_takes_the_place_of_the_last(replica, folders):
    agrees(replica, open_model(folders[0]), 0)
    policy = Policy(folders[0], seed=1)
    for version in (1, 2):
        policy.change(version)
        receipt = policy.publish(replica, version)
        assert ray.get(replica.served.remote()) == (version, receipt.checksum)
        assert receipt.bytes == sum(tensor.nbytes for tensor in trainable_parameters(policy.model))
        assert receipt.bytes < sum(tensor.nbytes for tensor in policy.model.parameters()) / 4
        agrees(replica, policy.model, version)


def test_another_base_is_served_without_the_adapter_and_takes_one_of_its_own(replica, folders):
    Policy(folders[0], seed=1).publish(replica, 3)
    RayRollout([replica], DEADLINE_S).load(folders[1], 4).result()
    agrees(replica, open_model(folders[1]), 4)
    policy = Policy(folders[1], seed=2, tuning=Lora(r=4, alpha=10, rslora=True))
    policy.publish(replica, 5)
    agrees(replica, policy.model, 5)
    publish(lambda: merged_weights(policy.model), [replica], 6, DEADLINE_S)  # as a stage that trains all weights
    agrees(replica, policy.model, 6)


@pytest.mark.parametrize("tuning", [Lora(r=4, dora=True), Lora(r=4, init="pissa"), Ia3(), Qlora(r=4)])
def test_merged_weights_of_other_methods_are_served_as_they_are(replica, folders, tuning):
    policy = Policy(folders[0], seed=3, tuning=tuning)
    publish(lambda: merged_weights(policy.model), [replica], 7, DEADLINE_S)
    agrees(replica, policy.model, 7)


@pytest.mark.parametrize(("r", "rank"), [(1, 1), (4, 8), (16, 16), (100, 128)])
def test_the_engine_has_room_for_the_rank(tmp_path, r, rank):
    spec = RolloutSpec(tmp_path, "float32", ROLE, max_length=8, threads=1, seed=0, lora=Lora(r=r))
    assert adapter_settings(spec)["max_lora_rank"] == rank


def test_a_rank_beyond_vllm_is_refused(tmp_path):
    spec = RolloutSpec(tmp_path, "float32", ROLE, max_length=8, threads=1, seed=0, lora=Lora(r=1000))
    with pytest.raises(RecipeError, match=r"rank 512, and tuning.r is 1000"):
        adapter_settings(spec)
