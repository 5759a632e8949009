"""Environment variables that must be set before a library is imported; nothing heavy is imported here."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rlhf.allocator import kernels
from rlhf.recipe.engine_memory import engine_memory
from rlhf.recipe.model_shape import read_shape

if TYPE_CHECKING:
    from rlhf.engines.base import RolloutSpec


def vllm_environment(spec: RolloutSpec) -> dict[str, str]:
    """Return the environment of a process that runs vLLM, to be set before torch and vllm are imported.

    Engine inside the process (a synchronous LLM hangs when its engine process dies), threads not pinned to cores
    that other roles use too, no hub, no telemetry, errors only on the console.
    """
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(spec.threads),
        "GOMP_SPINCOUNT": "10000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **kernels(os.environ),
    }


def cpu_cache_bytes(spec: RolloutSpec) -> int:
    """Return the bytes of the KV cache of an engine on the CPU."""
    shape = read_shape(spec.checkpoint)
    return engine_memory(shape, spec.dtype, spec.role, spec.max_length, None, spec.usual_length).room
