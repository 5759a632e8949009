"""The sizes of a model that memory and time depend on, read from its config alone: no weight is ever loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.recipe.base import Dtype
from rlhf.recipe.tuned_sizes import added, chosen, layer_numbers, packed_bytes, quantised, targets
from rlhf.recipe.tuning_schema import AnyLora, Full, Layers, Prompted, Qlora, Tuning

BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer.

    `lm_head` counts parameters of an output layer that is not tied to the embeddings; `linears` maps the name of each
    linear layer to its (inputs, outputs); `q_width` and `kv_width` are the widths of the queries and of the keys of
    one token in one layer. `biases` and `last_norm` count parameters, `layer_sizes` those of each layer;
    `kind` is the architecture in transformers' words, `positions` the tokens that it was made for, where it says so.
    """

    parameters: int
    lm_head: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    q_width: int
    kv_width: int
    vocabulary: int
    linears: dict[str, tuple[int, int]]
    biases: int
    layer_sizes: tuple[int, ...]
    last_norm: int
    kind: str = ""
    positions: int | None = None


@dataclass(frozen=True)
class Model:
    """A copy of the model in some role: `scalar` puts a score head in place of the language-model head.

    `tuning` says what of it trains, the score head beside that; None freezes it.
    """

    shape: ModelShape
    dtype: Dtype
    scalar: bool
    tuning: Tuning | None

    @property
    def size(self) -> int:
        """Bytes of one weight."""
        return BYTES[self.dtype]

    @property
    def trained(self) -> bool:
        """Whether anything of it is trained."""
        return self.tuning is not None

    @property
    def full(self) -> bool:
        """Whether every weight is trained."""
        return isinstance(self.tuning, Full)

    @property
    def lora_width(self) -> float:
        """The width of what the low-rank adapters of one layer hand from A to B, all targets together."""
        if not isinstance(self.tuning, AnyLora):
            return 0
        return self.tuning.r * len(targets(self.shape, self.tuning)) / self.shape.layers

    @property
    def body(self) -> int:
        """The parameters of the model itself, without what tuning adds."""
        whole = self.shape.parameters
        return whole - self.shape.lm_head + self.shape.hidden if self.scalar else whole

    @property
    def parameters(self) -> int:
        """All parameters, with what tuning adds."""
        return self.body + (added(self.shape, self.tuning) if self.tuning else 0)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters: those of linear layers that QLoRA quantises take half a byte and a scale."""
        packed = quantised(self.shape, self.tuning) if self.tuning else 0
        each = packed_bytes(self.tuning) if isinstance(self.tuning, Qlora) else 0.0
        return self.size * (self.parameters - packed) + int(each * packed)

    @property
    def trainable(self) -> int:
        """The parameters that the optimizer changes."""
        if self.tuning is None:
            return 0
        head = self.shape.hidden if self.scalar and not self.full else 0
        return chosen(self.shape, self.tuning, self.body) + head

    @property
    def virtual_tokens(self) -> int:
        """How many learned tokens stand before each row."""
        return self.tuning.virtual_tokens if isinstance(self.tuning, Prompted) else 0

    @property
    def learning_layers(self) -> int:
        """How many layers the gradient passes through: those above the lowest that learns."""
        if not isinstance(self.tuning, Layers):
            return self.shape.layers
        return self.shape.layers - min(layer_numbers(self.tuning, self.shape.layers))


def read_shape(folder: Path) -> ModelShape:
    """Build the model of a Hugging Face folder on the meta device (no memory) and measure it.

    RecipeError where it cannot be built, or where its files do not hold what its config describes.
    """
    from rlhf.models.folder import loading
    from rlhf.models.outline import outline

    config, model = outline(folder)
    with loading(folder):
        return _measured(config.get_text_config(), model)


def _measured(text: Any, model: Any) -> ModelShape:
    import torch
    from transformers.pytorch_utils import Conv1D

    from rlhf.models.layers import decoder_layers, last_norms

    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        lm_head=0 if head is None or tied else head.weight.numel(),
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        q_width=heads * head_dim,
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=text.vocab_size,
        linears={
            name: tuple(module.weight.shape[:: 1 if isinstance(module, Conv1D) else -1])
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        },
        biases=sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias")),
        layer_sizes=tuple(_size(layer) for layer in decoder_layers(model)),
        last_norm=sum(_size(norm) for norm in last_norms(model)),
        positions=getattr(text, "max_position_embeddings", None),
        kind=text.model_type,
    )


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
