"""DeepSpeed's settings for a model."""

from __future__ import annotations

from typing import Any, Literal

import torch

from rlhf.errors import RecipeError
from rlhf.recipe.role_schema import Offload, ZeroStage

Dtype = Literal["bfloat16", "float32"]

LARGEST_BUCKET = 500_000_000
"""Gradient elements that are reduced at once; smaller models get a buffer of their own size."""

WHOLE_BELOW = 100_000
"""ZeRO-3 keeps parameters with fewer elements whole on every rank."""


def check_settings(zero_stage: ZeroStage, dtype: Dtype, offload: Offload) -> None:
    """Raise RecipeError for what DeepSpeed cannot do."""
    if zero_stage == 0 and dtype == "bfloat16":
        raise RecipeError("ZeRO stage 0 cannot train bfloat16 weights; use stage 1, 2 or 3, or dtype: float32")
    if zero_stage == 0 and offload != "none":
        raise RecipeError(f"offload: {offload} needs zero_stage 1, 2 or 3")
    if zero_stage < 3 and offload == "parameters":
        raise RecipeError("offload: parameters needs zero_stage: 3")


def zero_config(
    zero_stage: ZeroStage, dtype: Dtype, offload: Offload, max_grad_norm: float, size: int
) -> dict[str, Any]:
    """Return the settings; the engine itself counts passes, clips at stage 0 and scales the rates.

    `size` is the number of elements that get gradients. What is offloaded stays in page-locked memory, and the
    optimizer there is torch's, which needs no compiler.
    """
    in_main_memory = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    kept_out = {"none": (), "optimizer": ("optimizer",), "parameters": ("optimizer", "param")}[offload]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm if zero_stage else 0.0,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": zero_stage,
            "reduce_bucket_size": max(1, min(size, LARGEST_BUCKET)),
            "stage3_param_persistence_threshold": WHOLE_BELOW,
            **{f"offload_{part}": in_main_memory for part in kept_out},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
