"""Low-rank adapters (Hu et al. 2021): adding, switching off, and merging on the fly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf.errors import RecipeError
from rlhf.recipe.base import Lora

ADAPTER = "default"
"""PEFT's name for the one set of adapters."""

BUCKET = 128 * 2**20
"""Bytes of parameters that are made whole at once where ranks hold parts of them."""

Gathered = Callable[[Sequence[Tensor]], AbstractContextManager[None]]
"""Makes a context in which the given parameters are whole on every rank."""


def leave_whole(parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Return the `Gathered` context of parameters that are whole anyway."""
    return nullcontext()


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
def merged_weights(
    model: PreTrainedModel | PeftModel, gathered: Gathered = leave_whole
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and weight of all that a plain checkpoint holds, one at a time, with adapters merged.

    An adapted weight is W + alpha / r * B A (Hu et al. 2021, section 4.1), computed in float32 and rounded once
    to W's dtype. Tied weights come once. Names are those of the checkpoint, also where transformers keeps the weights
    fused (mixtures of experts). A tensor is good until the next one is asked for, and not to be written to: it may be
    the model's own memory. Parameters cut over ranks are made whole by `gathered`, some `BUCKET` bytes at a time, and
    every rank must then ask for all of them.
    """
    plain = unwrapped(model)
    for bucket in _buckets(list(_checkpoint_sources(plain))):
        with gathered([part for source in bucket for part in source.parameters()]):
            for source in bucket:
                yield from revert_weight_conversion(plain, {source.name: source.merged()}).items()


@torch.no_grad()
def adapter_weights(model: PeftModel, gathered: Gathered = leave_whole) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapters alone, under the names of PEFT's `adapter_model.safetensors`; as `merged_weights` else."""
    tensors = [
        Source(name.replace(f".{ADAPTER}.", "."), parameter)
        for name, parameter in model.named_parameters()
        if not set(name.split(".")).isdisjoint(LoraLayer.adapter_layer_names)
    ]
    for bucket in _buckets(tensors):
        with gathered([source.weight for source in bucket]):
            for source in bucket:
                yield source.name, source.weight


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """Return what PEFT writes to `adapter_config.json`: JSON values only."""
    settings = model.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    return json.loads(json.dumps(plain, default=str))


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, and the adapted layer it is the base weight of, if it is one."""

    name: str
    weight: Tensor
    layer: LoraLayer | None = None

    def parameters(self) -> list[Tensor]:
        """Return the tensors that it is made of."""
        if self.layer is None:
            return [self.weight]
        sides = (self.layer.lora_A, self.layer.lora_B)
        return [self.weight, *(side[adapter].weight for side in sides for adapter in self.layer.active_adapters)]

    def bytes(self) -> int:
        """Return its whole size, also where this rank holds a part (ZeRO-3 says the whole in `ds_numel`)."""
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.parameters())

    def merged(self) -> Tensor:
        """Return the weight with the adapters in it."""
        if self.layer is None:
            return self.weight.detach()
        merged = self.weight.float()
        for adapter in self.layer.active_adapters:
            update = self.layer.lora_B[adapter].weight.float() @ self.layer.lora_A[adapter].weight.float()
            merged = merged + update * self.layer.scaling[adapter]
        return merged.to(self.weight.dtype)


def _checkpoint_sources(plain: PreTrainedModel) -> Iterator[Source]:
    for name, weight in plain.state_dict(keep_vars=True).items():
        parts = name.split(".")
        if name in plain.all_tied_weights_keys or not set(parts).isdisjoint(LoraLayer.adapter_layer_names):
            continue
        if "base_layer" in parts:
            *path, _, leaf = parts
            layer = plain.get_submodule(".".join(path)) if leaf == "weight" else None
            yield Source(".".join([*path, leaf]), weight, layer)
        else:
            yield Source(name, weight)


def _buckets(sources: Iterable[Source]) -> Iterator[list[Source]]:
    """Group in order so that a group has at most `BUCKET` bytes, or one tensor."""
    bucket: list[Source] = []
    size = 0
    for source in sources:
        if bucket and size + source.bytes() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(source)
        size += source.bytes()
    if bucket:
        yield bucket
