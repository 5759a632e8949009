"""Memory of a rollout engine's process in each phase, in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.recipe.base import Dtype
from rlhf.recipe.devices import Device
from rlhf.recipe.memory import CONTEXT, FLOAT, Memory
from rlhf.recipe.model_shape import BYTES, ModelShape
from rlhf.recipe.role_schema import RolloutRole

BATCHED_TOKENS = 8192
"""Prompt tokens that vLLM passes through the model at once, by default."""

GRAPHS = 512 << 20
"""What vLLM's CUDA graphs take, roughly."""


@dataclass(frozen=True)
class EngineMemory:
    """One GPU's part of a replica, or the whole of it on the CPU: awake, with its weights alone, and asleep.

    `room` is what the KV cache has, `needed` what `max_sequences` sequences of full length want, `least` one of them.
    """

    awake: Memory
    loaded: Memory
    asleep: Memory
    room: int
    needed: int
    least: int


def cache_gib(needed: int) -> int:
    """Return the whole GiB that a KV cache on the CPU gets for `needed` bytes: at most an eighth of main memory."""
    import psutil

    return max(1, min(-(-needed // 2**30), psutil.virtual_memory().total // 8 >> 30))


def engine_memory(
    shape: ModelShape, dtype: Dtype, role: RolloutRole, length: int, device: Device | None
) -> EngineMemory:
    """Estimate a replica that generates sequences of `length` tokens; `device` None is the CPU.

    vLLM on a GPU takes `gpu_memory_utilization` of the device and gives the KV cache what weights, activations and
    CUDA graphs leave of it; on the CPU it reserves `kv_cache_gib`, or `cache_gib`. transformers takes what its
    sequences need.
    """
    size, cut = BYTES[dtype], role.tensor_parallel
    weights = shape.parameters * size // cut
    token = shape.layers * 2 * shape.kv_width * size // min(cut, max(1, shape.kv_width * shape.heads // shape.q_width))
    needed = role.max_sequences * length * token
    logits = 2 * FLOAT * role.max_sequences * shape.vocabulary
    context = CONTEXT if device else 0
    asleep = Memory(buffers=context)
    if role.engine == "transformers":
        loaded = Memory(weights=weights, buffers=context)
        awake = Memory(weights=weights, logits=logits, kv_cache=needed, buffers=context)
        return EngineMemory(awake, loaded, asleep, needed, needed, length * token)
    if device is None:
        room = (role.kv_cache_gib or cache_gib(needed)) << 30
        awake = Memory(weights=weights, logits=logits, kv_cache=room)
        return EngineMemory(awake, Memory(weights=weights), asleep, room, needed, length * token)
    passes = BATCHED_TOKENS * size * (3 * shape.hidden + 3 * shape.intermediate // cut)
    buffers = context + GRAPHS
    room = int(role.gpu_memory_utilization * device.memory) - weights - passes - logits - buffers
    awake = Memory(weights, activations=passes, logits=logits, kv_cache=max(0, room), buffers=buffers)
    return EngineMemory(awake, Memory(weights=weights, buffers=buffers), asleep, room, needed, length * token)
