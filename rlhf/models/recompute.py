"""Computing activations again backward instead of keeping them (Chen et al. 2016)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from rlhf.models.tuning import unwrapped

KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}


def recompute_activations(model: PreTrainedModel | PeftModel) -> None:
    """Keep only the input of each transformer layer while training; the gradients are the same."""
    unwrapped(model).gradient_checkpointing_enable({"use_reentrant": False, "context_fn": _same_attention})


def _same_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of forward and of forward again: the second chooses the attention of the first."""
    return nullcontext(), sdpa_kernel([kernel for kernel, enabled in KERNELS.items() if enabled()])
