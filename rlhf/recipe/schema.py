"""The recipe: every key a user can write, its type, its bounds and its one default."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveInt

from rlhf.recipe.base import Budget, Lora, Strict
from rlhf.recipe.stage_schema import Stage


class ModelSource(Strict):
    """The base model: a hub id, a local folder, `gguf://package/file.gguf` or `tiny://llama` (random, for tests)."""

    path: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    chat_template: Path | None = Field(None, description="a Jinja file that replaces the tokenizer's chat template")


class Role(Strict):
    """Where a role runs; fractions of an accelerator are allowed."""

    gpus: NonNegativeFloat = 0
    cpus: NonNegativeFloat = 1


class ReferenceRole(Role):
    """The frozen reference; `share: policy` computes it in the policy's process with the adapters off."""

    share: Literal["policy"] | None = None


class RolloutRole(Role):
    """A generation engine."""

    engine: Literal["vllm", "transformers"] = "vllm"
    replicas: PositiveInt = 1
    tensor_parallel: PositiveInt = 1
    max_sequences: PositiveInt = Field(64, description="sequences generated at once by one replica")
    kv_cache_gib: PositiveInt = Field(1, description="KV cache per replica on CPU, whole GiB")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)


class Roles(Strict):
    """All roles; the defaults put every one on the CPU in its own process."""

    policy: Role = Role()
    reference: ReferenceRole = ReferenceRole()
    reward: Role = Role()
    critic: Role = Role()
    rollout: RolloutRole = RolloutRole()
    judge: RolloutRole = Field(RolloutRole(), description="of a language model as judge that runs here")


class Wandb(Strict):
    """Weights & Biases as an extra sink; the key comes from WANDB_API_KEY, offline without one."""

    project: str
    entity: str | None = None


class Tracking(Strict):
    """Where metrics go beside `metrics.jsonl`."""

    wandb: Wandb | None = None


class Ray(Strict):
    """How to reach Ray: unset starts a local one on loopback."""

    address: str | None = Field(None, pattern=r"^(auto|[^/]+:\d+)$", description="host:port of a running Ray, or auto")
    placement_timeout_s: NonNegativeFloat = 180
    call_timeout_s: NonNegativeFloat = Field(1800, description="deadline of any single call to a role")


class Recipe(Strict):
    """One alignment run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(17, ge=0, lt=2**31)
    model: ModelSource
    lora: Lora | Literal["full"] = Lora()
    backend: Literal["ray", "local"] = "ray"
    ray: Ray = Ray()
    roles: Roles = Roles()
    tracking: Tracking = Tracking()
    checkpoints: dict[str, str] = Field(
        default_factory=dict, description="name -> folder or hub id: models from elsewhere that stages may refer to"
    )
    seeds: list[int] = Field(
        default_factory=list, description="run every preference and online stage once per seed, each as a branch"
    )
    budget: Budget | None = Field(None, description="the same limit for every preference and online stage")
    on_diagnosis: Literal["warn", "stop"] = Field(
        "warn", description="what a diagnosis like a KL blow-up does to a stage that trains"
    )
    output_dir: Path = Field(Path("runs"), description="run folders are made here, relative to the working directory")
    stages: list[Stage] = Field(min_length=1)
