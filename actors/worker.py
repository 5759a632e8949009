"""The environment of a role's process, fixed before it starts."""

from __future__ import annotations

import os

from rlhf.allocator import allocator, kernels

SPIN = "10000"
"""How long an idle OpenMP thread spins: as fast as spinning for ever, but it soon yields to other processes."""


def learner_environment() -> dict[str, str]:
    """Return the environment of a process that trains or scores; its threads are set when a model is built."""
    return {
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": SPIN,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        **kernels(os.environ),
        **allocator(os.environ),
    }
