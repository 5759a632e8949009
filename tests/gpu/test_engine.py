"""vLLM on the policy's own GPU: weights by CUDA IPC, agreement after them, and what sleeping frees.

Needs vllm and ray beside a CUDA device; on a machine with two devices NCCL to an engine on the second one as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

ray = pytest.importorskip("ray")

from actors.learner import LearnerActor  # noqa: E402
from actors.rollout import Replica  # noqa: E402
from actors.worker import learner_environment  # noqa: E402
from rlhf.data.collate import collate_rollouts  # noqa: E402
from rlhf.engines.base import LearnerSpec, RolloutSpec  # noqa: E402
from rlhf.engines.environment import vllm_environment  # noqa: E402
from rlhf.engines.objectives import Sft  # noqa: E402
from rlhf.engines.shares import token_scores  # noqa: E402
from rlhf.recipe.base import Optimizer  # noqa: E402
from rlhf.recipe.role_schema import RolloutRole  # noqa: E402
from rlhf.recipe.tuning_schema import Full  # noqa: E402
from rlhf.types import Prompt, Sampling  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm"),
]

DEADLINE_S = 600.0
PROMPTS = [Prompt(str(n), tuple(6 + (7 * i + n) % 256 for i in range(n)), "") for n in (5, 150, 9, 40)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_gpus=torch.cuda.device_count(), include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def policy(folder: Path, devices: str) -> Any:
    environment = learner_environment() | {"CUDA_VISIBLE_DEVICES": devices}
    actor = ray.remote(LearnerActor).options(num_cpus=1, runtime_env={"env_vars": environment}).remote()
    optimizer = Optimizer(learning_rate=1e-4, schedule="constant")
    spec = LearnerSpec("policy", "causal", folder, "bfloat16", Full(), optimizer, None, 4096, 1.0, 4, 3)
    ray.get(actor.build.remote(spec), timeout=DEADLINE_S)
    return actor


def replica(folder: Path, devices: str, role: RolloutRole) -> Any:
    spec = RolloutSpec(folder, "bfloat16", role, max_length=512, threads=4, seed=0)
    environment = vllm_environment(spec) | {"CUDA_VISIBLE_DEVICES": devices}
    actor = Replica.options(num_cpus=1, runtime_env={"env_vars": environment}).remote(spec)
    ray.get(actor.ping.remote(), timeout=DEADLINE_S)
    return actor


def disagreement(learner: Any, engine: Any) -> float:
    """Return the mean |engine - trainer| over the engine's own samples, in nats."""
    seeds = [[1, 2]] * len(PROMPTS)
    rollouts = ray.get(engine.generate.remote(PROMPTS, Sampling(32), seeds), timeout=DEADLINE_S)
    batch = collate_rollouts(rollouts, 0)
    scores = token_scores([ray.get(learner.logprobs.remote(batch), timeout=DEADLINE_S)])
    return float((scores.logprobs - batch.rollout_logprobs).abs()[batch.response_mask].mean())


def learn(learner: Any, times: int) -> None:
    rows = collate_rollouts(
        [_answered(prompt, tuple(6 + (3 * i) % 256 for i in range(64))) for prompt in PROMPTS],
        0,
    )
    for _ in range(times):
        ray.get(learner.train.remote(rows, Sft(), [range(len(PROMPTS))], 10.0), timeout=DEADLINE_S)


def _answered(prompt: Prompt, tokens: tuple[int, ...]) -> Any:
    from rlhf.types import Rollout

    return Rollout(prompt, tokens, (0.0,) * len(tokens), "", "stop", 0, 0)


def test_ipc_brings_new_weights_to_an_engine_on_the_same_gpu(cluster: None, gpu_folder: Path) -> None:
    engine = replica(gpu_folder, "0", RolloutRole(share="policy", gpu_memory_utilization=0.3, max_sequences=16))
    learner = policy(gpu_folder, "0")
    assert disagreement(learner, engine) < 0.05
    learn(learner, 5)
    stale = disagreement(learner, engine)
    free = torch.cuda.mem_get_info()[0]
    ray.get(engine.sleep.remote(), timeout=DEADLINE_S)
    assert torch.cuda.mem_get_info()[0] - free > 0.2 * torch.cuda.mem_get_info()[1]
    ray.get(engine.wake.remote("weights"), timeout=DEADLINE_S)
    receipt = ray.get(learner.publish.remote([engine], 1, DEADLINE_S), timeout=DEADLINE_S)
    ray.get(engine.wake.remote("kv_cache"), timeout=DEADLINE_S)
    assert (receipt.version, receipt.bytes) == (1, 2 * _parameters(gpu_folder))
    assert disagreement(learner, engine) < 0.05 < 0.2 < stale
    ray.kill(learner)
    ray.kill(engine)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL joins two devices")
def test_nccl_brings_new_weights_to_an_engine_on_another_gpu(cluster: None, gpu_folder: Path) -> None:
    engine = replica(gpu_folder, "1", RolloutRole(gpus=1, gpu_memory_utilization=0.3, max_sequences=16))
    learner = policy(gpu_folder, "0")
    learn(learner, 5)
    stale = disagreement(learner, engine)
    for version in (1, 2):
        receipt = ray.get(learner.publish.remote([engine], version, DEADLINE_S), timeout=DEADLINE_S)
        assert receipt.version == version
    assert disagreement(learner, engine) < 0.05 < 0.2 < stale
    ray.kill(learner)
    ray.kill(engine)


def _parameters(folder: Path) -> int:
    from rlhf.engines.shared_memory import folder_weights

    return sum(tensor.numel() for _, tensor in folder_weights(folder))
