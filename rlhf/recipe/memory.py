"""Memory of a role, estimated from the model's config alone: no weight is ever loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.recipe.base import Lora
from rlhf.recipe.role_schema import RolloutRole

BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory depends on.

    `lm_head` counts parameters of an output layer that is not tied to the embeddings; `linears` maps the name
    of each linear layer to (inputs + outputs), what one rank of LoRA costs there; `kv_width` is the width of
    the keys of one token in one layer.
    """

    parameters: int
    lm_head: int
    hidden: int
    intermediate: int
    layers: int
    kv_width: int
    vocabulary: int
    linears: dict[str, int]

    def lora_parameters(self, lora: Lora) -> int:
        """Return the parameters that adapters add: r * (inputs + outputs) for each target layer (Hu et al. 2021)."""
        return lora.r * sum(width for name, width in self.linears.items() if _is_target(name, lora))


@dataclass(frozen=True)
class Memory:
    """Bytes of one process of a role."""

    weights: int
    optimizer: int
    activations: int
    kv_cache: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.optimizer + self.activations + self.kv_cache


def read_shape(folder: Path) -> ModelShape:
    """Build the model of a Hugging Face folder on the meta device (no memory) and measure it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
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
        kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        vocabulary=text.vocab_size,
        linears={
            name: sum(module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        },
    )


@dataclass(frozen=True)
class Model:
    """A copy of the model in some role: `scalar` puts a score head in place of the language-model head.

    `trained` False freezes it; otherwise `lora` None trains every weight, and adapters train with the score head.
    """

    shape: ModelShape
    dtype: Literal["bfloat16", "float32"]
    scalar: bool
    trained: bool
    lora: Lora | None

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

    def memory(self, tokens: int) -> Memory:
        """Estimate one process that passes micro-batches of `tokens` tokens through the model.

        Covered: the weights; for each trainable parameter its gradient, the fp32 master copy and accumulated
        gradient, and two fp32 Adam moments; the activations of one micro-batch (kept in all layers when training,
        in one when scoring) with fp32 logits of every token. Not covered: allocator slack, communication
        buffers, and the libraries themselves (about 1 GB of main memory a process).
        """
        size = BYTES[self.dtype]
        shape = self.shape
        per_layer = 8 * shape.hidden + 2 * shape.kv_width + 4 * shape.intermediate
        layers = shape.layers if self.trained else 1
        logits = 0 if self.scalar else 4 * shape.vocabulary * (2 if self.trained else 1)
        return Memory(
            weights=self.parameters * size,
            optimizer=self.trainable * (size + 16),
            activations=tokens * (layers * per_layer * size + logits),
            kv_cache=0,
        )


def engine_memory(shape: ModelShape, dtype: Literal["bfloat16", "float32"], role: RolloutRole, length: int) -> Memory:
    """Estimate one rollout replica: weights, fp32 logits of one token per sequence, and the KV cache.

    vLLM on CPU reserves `kv_cache_gib`. Else the figure is what `max_sequences` sequences of `length` tokens
    need; vLLM on a GPU takes `gpu_memory_utilization` of the device and fills it with as many as fit.
    """
    size = BYTES[dtype]
    fixed = role.engine == "vllm" and not role.gpus
    needed = role.max_sequences * length * shape.layers * 2 * shape.kv_width * size
    return Memory(
        weights=shape.parameters * size,
        optimizer=0,
        activations=role.max_sequences * shape.vocabulary * 4,
        kv_cache=role.kv_cache_gib << 30 if fixed else needed,
    )


def _is_target(name: str, lora: Lora) -> bool:
    if lora.target_modules == "all-linear":
        return True
    return any(name == target or name.endswith(f".{target}") for target in lora.target_modules)
