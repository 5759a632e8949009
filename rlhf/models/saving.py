"""Writing models as plain Hugging Face folders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.lora import merged_weights, unwrapped
from rlhf.models.tokenizer import ChatTokenizer

DType = Literal["bfloat16", "float32"]


def save_merged(model: PreTrainedModel | PeftModel, tokenizer: ChatTokenizer, folder: Path, dtype: DType) -> None:
    """Write a Hugging Face folder with the adapters merged, in `dtype`, that transformers and vLLM load.

    Merging happens before the cast, and the model itself does not change. The generation config stops at
    every end-of-sequence token of the chat tokenizer.
    """
    save_folder(model, tokenizer.hf, folder, dtype, tokenizer.eos_ids)


def save_folder(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: DType,
    eos_ids: tuple[int, ...] | None = None,
) -> None:
    """Write weights (safetensors, in shards of 5 GB), config, generation config and tokenizer to `folder`.

    Unlike `save_pretrained` it accepts models that were dequantised while loading, and generation configs that
    transformers itself would not have written; `eos_ids`, where given, replace the end tokens in there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = getattr(torch, dtype)
    weights = {
        name: weight.to("cpu", target if weight.is_floating_point() else weight.dtype)
        for name, weight in merged_weights(model)
    }
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})

    plain = unwrapped(model)
    config = copy.deepcopy(plain.config)
    config.architectures = [type(plain).__name__]
    config.dtype = target
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    if plain.can_generate():
        generation = copy.deepcopy(plain.generation_config)
        if eos_ids is not None:
            generation.eos_token_id = list(eos_ids)
        generation.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
