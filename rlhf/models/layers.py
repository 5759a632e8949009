"""Where a decoder's layers and its last norm are."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder's layers in order; none where the model does not keep them in one list."""
    _, layers = _found(model)
    return layers


def last_norms(model: PreTrainedModel) -> list[nn.Module]:
    """Return the norm behind the last layer, if there is one."""
    owner, _ = _found(model)
    norms = [child for child in owner.children() if "norm" in type(child).__name__.lower()] if owner else []
    return norms[-1:]


def _found(model: PreTrainedModel) -> tuple[nn.Module | None, list[nn.Module]]:
    count = model.config.get_text_config().num_hidden_layers
    for owner in model.base_model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return owner, list(child)
    return None, []
