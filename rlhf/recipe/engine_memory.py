"""Memory of a rollout engine's process in each phase, in bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.recipe.base import Dtype
from rlhf.recipe.devices import Device
from rlhf.recipe.memory import CONTEXT, FLOAT, Memory
from rlhf.recipe.model_shape import BYTES, ModelShape
from rlhf.recipe.role_schema import RolloutRole

BLOCK = 128
"""Tokens in one block of vLLM's KV cache on the CPU."""

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


def cpu_cache(sequences: int, usual: int, length: int, token: int) -> int:
    """Return the bytes of a KV cache on the CPU, where a token takes `token` bytes.

    It holds `sequences` of `usual` tokens, in blocks of `BLOCK`, as far as an eighth of main memory goes, and always
    one sequence of `length` tokens, without which vLLM does not start.
    """
    import psutil

    block = BLOCK * token
    wanted = sequences * math.ceil(usual / BLOCK) * block
    least = math.ceil(length / BLOCK) * block
    return max(least, min(wanted, psutil.virtual_memory().total // 8 // block * block)) + block  # one is never used


def engine_memory(
    shape: ModelShape, dtype: Dtype, role: RolloutRole, length: int, device: Device | None, usual: int | None = None
) -> EngineMemory:
    """Estimate a replica that generates sequences of at most `length` tokens; `device` None is the CPU.

    vLLM on a GPU takes `gpu_memory_utilization` of the device and gives the KV cache what weights, activations and
    CUDA graphs leave of it; on the CPU the cache gets `kv_cache_gib`, or `cpu_cache` for sequences of `usual` tokens
    (unset: `length`). transformers takes what its sequences need.
    """
    usual = min(usual or length, length)
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
        own = role.kv_cache_gib
        room = round(own * 2**30) if own else cpu_cache(role.max_sequences, usual, length, token)
        packed = size * shape.vocabulary * shape.hidden  # the head as the CPU's products want it
        awake = Memory(weights=weights, logits=logits, kv_cache=room, buffers=packed)
        least = cpu_cache(1, length, length, token)
        return EngineMemory(awake, Memory(weights=weights, buffers=packed), asleep, room, needed, least)
    passes = BATCHED_TOKENS * size * (3 * shape.hidden + 3 * shape.intermediate // cut)
    buffers = context + GRAPHS
    room = int(role.gpu_memory_utilization * device.memory) - weights - passes - logits - buffers
    awake = Memory(weights, activations=passes, logits=logits, kv_cache=max(0, room), buffers=buffers)
    return EngineMemory(awake, Memory(weights=weights, buffers=buffers), asleep, room, needed, length * token)
