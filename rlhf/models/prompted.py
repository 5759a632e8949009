"""Models that read learned tokens before the text: prefix, prompt and P-tuning."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, PeftType
from torch import nn

from rlhf.models.tuning import unwrapped
from rlhf.types import TokenBatch


def padded_inputs(model: nn.Module, batch: TokenBatch) -> tuple[dict[str, Any], int]:
    """Return the arguments of the plain model's forward pass for padded rows, and how many positions come before them.

    A prefix stands in the cache; prompts are embeddings before the rows' own, so that outputs are longer by their
    number. The text's positions count from behind either, as in PEFT's own forward pass.
    """
    inputs: dict[str, Any] = {"attention_mask": batch.attention_mask.long(), "use_cache": False}
    if not is_prompted(model):
        return inputs | {"input_ids": batch.tokens}, 0
    assert isinstance(model, PeftModel)
    rows, config = len(batch), model.active_peft_config
    seen = inputs["attention_mask"].new_ones(rows, config.num_virtual_tokens)
    inputs["attention_mask"] = torch.cat([seen, inputs["attention_mask"]], dim=1)
    prompt = model.get_prompt(rows)
    if config.peft_type == PeftType.PREFIX_TUNING:
        return inputs | {"input_ids": batch.tokens, "past_key_values": prompt}, 0
    text = unwrapped(model).get_input_embeddings()(batch.tokens)
    return inputs | {"inputs_embeds": torch.cat([prompt.to(text.dtype), text], dim=1)}, config.num_virtual_tokens


def is_prompted(model: nn.Module) -> bool:
    """Return whether learned tokens stand before the text, and are not switched off."""
    return isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning and not model._adapters_disabled
