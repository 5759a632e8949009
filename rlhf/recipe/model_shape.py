"""The sizes of a model that memory and time depend on, read from its config alone: no weight is ever loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.recipe.base import Lora

Dtype = Literal["bfloat16", "float32"]
BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer.

    `lm_head` counts parameters of an output layer that is not tied to the embeddings; `linears` maps the name of each
    linear layer to (inputs + outputs), what one rank of LoRA costs there; `q_width` and `kv_width` are the widths of
    the queries and of the keys of one token in one layer.
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
    linears: dict[str, int]

    def lora_parameters(self, lora: Lora) -> int:
        """Return the parameters that adapters add: r * (inputs + outputs) for each target layer (Hu et al. 2021)."""
        return lora.r * sum(width for name, width in self.linears.items() if _is_target(name, lora))

    def lora_width(self, lora: Lora) -> float:
        """Return the width of what the adapters of one layer hand from A to B, all targets together."""
        return lora.r * sum(_is_target(name, lora) for name in self.linears) / self.layers


@dataclass(frozen=True)
class Model:
    """A copy of the model in some role: `scalar` puts a score head in place of the language-model head.

    `trained` False freezes it; otherwise `lora` None trains every weight, and adapters train with the score head.
    """

    shape: ModelShape
    dtype: Dtype
    scalar: bool
    trained: bool
    lora: Lora | None

    @property
    def size(self) -> int:
        """Bytes of one weight."""
        return BYTES[self.dtype]

    @property
    def parameters(self) -> int:
        """All parameters, adapters included."""
        body = self.shape.parameters - self.shape.lm_head + self.shape.hidden if self.scalar else self.shape.parameters
        return body + (self.shape.lora_parameters(self.lora) if self.trained and self.lora else 0)

    @property
    def trainable(self) -> int:
        """The parameters that the optimizer changes."""
        if not self.trained:
            return 0
        if self.lora is None:
            return self.parameters
        return self.shape.lora_parameters(self.lora) + (self.shape.hidden if self.scalar else 0)


def read_shape(folder: Path) -> ModelShape:
    """Build the model of a Hugging Face folder on the meta device (no memory) and measure it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    from rlhf.models.folder import loading

    with loading(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, attn_implementation="sdpa")
    text = config.get_text_config()
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
            name: sum(module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        },
    )


def _is_target(name: str, lora: Lora) -> bool:
    if lora.target_modules == "all-linear":
        return True
    return any(name == target or name.endswith(f".{target}") for target in lora.target_modules)
