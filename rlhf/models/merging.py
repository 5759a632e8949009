"""A model's weights as a plain checkpoint holds them, with adapters merged on the fly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from peft import IA3Config, LoraConfig, PeftModel
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf.errors import RecipeError
from rlhf.models.quantised import whole_weight
from rlhf.models.tuning import ADAPTER, unwrapped
from rlhf.pulse import PULSE

BUCKET = 128 * 2**20
"""Bytes of parameters that are made whole at once where ranks hold parts of them."""

ADDED = {"lora_A", "lora_B", "lora_magnitude_vector", "ia3_l"}
"""What adapters are called inside the layers that they change."""

Gathered = Callable[[Sequence[Tensor]], AbstractContextManager[None]]
"""Makes a context in which the given parameters are whole on every rank."""


def leave_whole(parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Return the `Gathered` context of parameters that are whole anyway."""
    return nullcontext()


@torch.no_grad()
def merged_weights(
    model: PreTrainedModel | PeftModel, gathered: Gathered = leave_whole
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and weight of all that a plain checkpoint holds, one at a time, with adapters merged.

    An adapted weight is computed in float32 and rounded once to W's dtype, that of the model where W is quantised:
    W + s B A with s = alpha / r (Hu et al. 2021, section 4.1) or alpha / sqrt(r); with DoRA that, its rows brought to
    the learned lengths; with IA3 W times the learned factors. Tied weights come once. Names are those of the
    checkpoint, also where transformers keeps the weights fused (mixtures of experts). A tensor is good until the next
    one is asked for, and not to be written to: it may be the model's own memory. Parameters cut over ranks are made
    whole by `gathered`, some `BUCKET` bytes at a time, and every rank must then ask for all of them.
    """
    if isinstance(model, PeftModel) and not isinstance(config := model.peft_config[ADAPTER], LoraConfig | IA3Config):
        raise RecipeError(f"tuning: what is learned by {config.peft_type.value} cannot be merged into the model")
    plain = unwrapped(model)
    for bucket in buckets(_checkpoint_sources(plain)):
        with gathered([part for source in bucket for part in source.parameters()]):
            for source in bucket:
                PULSE.beat()
                yield from revert_weight_conversion(plain, {source.name: source.merged()}).items()


@dataclass(frozen=True)
class Source:
    """A tensor of a checkpoint, and the adapted layer it is the weight or the bias of, if it is one."""

    name: str
    weight: Tensor
    layer: BaseTunerLayer | None = None

    def parameters(self) -> list[Tensor]:
        """Return the tensors that it is made of."""
        if self.layer is None:
            return [self.weight]
        added = [part for name in ADDED if (part := getattr(self.layer, name, None)) is not None]
        return [self.weight, *(parameter for part in added for parameter in part.parameters())]

    def merged(self) -> Tensor:
        """Return the weight with the adapters in it."""
        weight = whole_weight(self.weight).detach()
        if self.layer is None:
            return weight
        if isinstance(self.layer, IA3Layer):
            return _scaled(self.layer, weight).to(weight.dtype)
        assert isinstance(self.layer, LoraLayer)
        return _updated(self.layer, weight).to(weight.dtype)


def _updated(layer: LoraLayer, weight: Tensor) -> Tensor:
    """Return W + s B A in float32, and with DoRA its rows at the learned lengths (Liu et al. 2024, equation 5)."""
    update = layer.lora_B[ADAPTER].weight.float() @ layer.lora_A[ADAPTER].weight.float()
    if layer.fan_in_fan_out:
        update = update.T
    merged = weight.float() + update * layer.scaling[ADAPTER]
    if ADAPTER not in layer.lora_magnitude_vector:
        return merged
    rows = 0 if layer.fan_in_fan_out else 1
    lengths = layer.lora_magnitude_vector[ADAPTER].weight.float()
    return merged * (lengths / torch.linalg.norm(merged, dim=rows)).unsqueeze(rows)


def _scaled(layer: IA3Layer, weight: Tensor) -> Tensor:
    """Return a layer's weight or bias times the factors of its outputs, or of its inputs, in float32."""
    factors = layer.ia3_l[ADAPTER].float()
    if weight.ndim == 1:
        return weight.float() if layer.is_feedforward else weight.float() * factors.flatten()
    return weight.float() * (factors.T if layer.fan_in_fan_out else factors)


def _checkpoint_sources(plain: PreTrainedModel) -> Iterator[Source]:
    for name, weight in plain.state_dict(keep_vars=True).items():
        parts = name.split(".")
        below = parts[:-1]  # of a 4-bit weight its scales are, and belong to it
        if name in plain.all_tied_weights_keys or not ADDED.isdisjoint(parts) or "weight" in below:
            continue
        if "base_layer" not in parts:
            yield Source(name, weight)
            continue
        *path, _, leaf = parts
        layer = plain.get_submodule(".".join(path))
        changed = isinstance(layer, BaseTunerLayer) and (leaf == "weight" or isinstance(layer, IA3Layer))
        yield Source(".".join([*path, leaf]), weight, layer if changed else None)


class Sized(Protocol):
    """Something made of parameters."""

    def parameters(self) -> list[Tensor]:
        """Return them."""
        ...


S = TypeVar("S", bound=Sized)


def buckets(sources: Iterable[S]) -> Iterator[list[S]]:
    """Group in order so that a group has at most `BUCKET` bytes, or one source.

    Sizes are whole, also where this rank holds a part (ZeRO-3 says the whole in `ds_numel`).
    """
    bucket: list[S] = []
    size = 0
    for source in sources:
        more = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in source.parameters())
        if bucket and size + more > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(source)
        size += more
    if bucket:
        yield bucket
