"""Where each role runs, on how many processes, and what it keeps out of accelerator memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rlhf.recipe.base import Strict

RoleName = Literal["policy", "reference", "reward", "critic", "rollout", "judge"]
ZeroStage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "parameters"]


class Role(Strict):
    """What each process of a role takes; fractions of an accelerator are allowed."""

    gpus: NonNegativeFloat = 0
    cpus: NonNegativeFloat = 1


class ModelRole(Role):
    """A role that holds a model; its ranks share the work of every batch."""

    ranks: PositiveInt = Field(1, description="processes, each with `gpus`, `cpus` and a share of each batch")
    zero_stage: ZeroStage = Field(
        2,
        description="what DeepSpeed cuts over the ranks: nothing (0), the optimizer's state (1), gradients too (2), "
        "weights too (3); a frozen model is cut at 3 and copied to each rank below",
    )


class TrainedRole(ModelRole):
    """A role whose model may be trained."""

    offload: Offload = Field(
        "none", description="keep the optimizer's state in main memory, or with zero_stage 3 the parameters too"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute activations again backward instead of keeping them: slower, much less memory"
    )


class ReferenceRole(ModelRole):
    """The frozen reference.

    `share: policy` puts it where the policy is: with LoRA as the policy's own base with the adapters off, otherwise
    as processes of its own on the policy's devices.
    """

    share: Literal["policy"] | None = None


class RewardRole(TrainedRole):
    """The reward model; `share` puts its processes on the devices of another role."""

    share: Literal["policy", "reference", "critic"] | None = None


class CriticRole(TrainedRole):
    """The critic; `share` puts its processes on the devices of another role."""

    share: Literal["policy", "reference", "reward"] | None = None


class RolloutRole(Role):
    """A generation engine; `share: policy` takes turns with the policy on its devices (colocated)."""

    engine: Literal["vllm", "transformers"] = "vllm"
    replicas: PositiveInt = 1
    tensor_parallel: PositiveInt = 1
    share: Literal["policy"] | None = None
    max_sequences: PositiveInt = Field(
        default_factory=lambda role: 256 if role.get("gpus") or role.get("share") else 64,
        description="sequences generated at once by one replica; unset is 64 on the CPU and 256 on a GPU",
    )
    kv_cache_gib: PositiveFloat | None = Field(
        None,
        description="KV cache per replica on CPU, in GiB; unset is what max_sequences sequences as long as the data's "
        "longest prompt and a whole response need, at most an eighth of main memory",
    )
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    weights: Literal["merged", "adapter"] = Field(
        "merged",
        description="how LoRA reaches the engine: merged into the base (generation at full speed), or as an adapter "
        "(small transfers; generation is slower)",
    )


class Roles(Strict):
    """All roles; the defaults put every one on the CPU in its own process."""

    policy: TrainedRole = TrainedRole()
    reference: ReferenceRole = ReferenceRole()
    reward: RewardRole = RewardRole()
    critic: CriticRole = CriticRole()
    rollout: RolloutRole = RolloutRole()
    judge: RolloutRole = Field(RolloutRole(), description="of a language model as judge that runs here")
