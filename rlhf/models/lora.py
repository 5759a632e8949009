"""Low-rank adapters (Hu et al. 2021): adding, switching off, and merging on the fly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf.errors import RecipeError
from rlhf.recipe.base import Lora


def add_lora(model: PreTrainedModel, lora: Lora, kind: Literal["causal", "scalar"], seed: int) -> PeftModel:
    """Freeze the model and put adapters of its own dtype on it; a scalar head stays trainable as it is.

    The first output equals the model's, as B starts at zero; A is drawn by `seed`, whatever the global
    random state. Raises RecipeError when `target_modules` names nothing in the model, or its embeddings or head.
    """
    everything = lora.target_modules == "all-linear"
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=["score"] if everything and kind == "scalar" else None,
        task_type="CAUSAL_LM" if kind == "causal" else None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        except ValueError as error:
            raise RecipeError(f"lora.target_modules: {lora.target_modules} does not fit the model: {error}") from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings(), getattr(model, "score", None))
    if any(isinstance(end, LoraLayer) for end in ends):
        raise RecipeError(
            f"lora.target_modules: {lora.target_modules} includes the embeddings or the head; leave it out"
        )
    if kind == "scalar":
        model.score.requires_grad_(True)
    return adapted


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model inside (its layers keep their adapters), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the model is its frozen base, bit for bit.

    Raises RecipeError for a model without adapters, whose base is gone once it trains.
    """
    if not isinstance(model, PeftModel):
        raise RecipeError(
            "roles.reference.share: the policy trains all its weights, so no reference is left inside it; "
            "use `lora`, or give the reference its own process"
        )
    return model.disable_adapter()


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that get gradients, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def merged_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield name and weight of all that a plain checkpoint holds, one at a time, with adapters merged.

    An adapted weight is W + alpha / r * B A (Hu et al. 2021, section 4.1), computed in float32 and rounded once
    to W's dtype. Other weights are the model's own memory: read them, do not write. Tied weights come once.
    Names are those of the checkpoint, also where transformers keeps the weights fused (mixtures of experts).
    """
    plain = unwrapped(model)
    for name, weight in plain.state_dict().items():
        parts = name.split(".")
        if name in plain.all_tied_weights_keys or not set(parts).isdisjoint(LoraLayer.adapter_layer_names):
            continue
        if "base_layer" in parts:
            *path, _, leaf = parts
            layer = plain.get_submodule(".".join(path))
            name = ".".join([*path, leaf])
            weight = _merged(layer, weight) if leaf == "weight" else weight
        yield from revert_weight_conversion(plain, {name: weight}).items()


def _merged(layer: LoraLayer, weight: Tensor) -> Tensor:
    merged = weight.float()
    for adapter in layer.active_adapters:
        update = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
        merged = merged + update * layer.scaling[adapter]
    return merged.to(weight.dtype)
