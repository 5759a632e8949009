"""Models whose linear layers are kept in 4 bits, NF4 (Dettmers et al. 2023), by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.errors import RecipeError
from rlhf.installing import extra_command
from rlhf.models.lean import show_bitsandbytes
from rlhf.recipe.tuning_schema import Qlora, Tuning


def check_quantisation() -> None:
    """Raise RecipeError where bitsandbytes is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(f"tuning.kind: qlora needs bitsandbytes: {extra_command('qlora')}, or use lora")


def quantisation(tuning: Tuning | None, dtype: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that load a model as the method wants it: none for most."""
    if not isinstance(tuning, Qlora):
        return {}
    check_quantisation()
    show_bitsandbytes()
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=tuning.double_quantisation,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config}


def keep_packing(model: PreTrainedModel) -> None:
    """Let 4-bit layers multiply in one way, on CPUs with AVX512-BF16 too.

    There bitsandbytes packs weights anew, and rounds their scales, at the first pass without gradients; what the model
    says would then depend on whether it was asked before.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def whole_weight(weight: Tensor) -> Tensor:
    """Return a weight as it is multiplied with: dequantised, where it is kept in 4 bits."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    import bitsandbytes

    whole: Tensor = bitsandbytes.functional.dequantize_4bit(weight.data, state)
    return whole
