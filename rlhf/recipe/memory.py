"""Memory of a role, estimated from the model's config alone: no weight is ever loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf.recipe.base import Lora

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


def read_shape(folder: Path, *, trust_remote_code: bool = False) -> ModelShape:
    """Build the model of a Hugging Face folder on the meta device (no memory) and measure it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
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


def model_parameters(shape: ModelShape, *, scalar: bool) -> int:
    """Return the parameters of a language model, or of the same body with a scalar head (no bias)."""
    return shape.parameters - shape.lm_head + shape.hidden if scalar else shape.parameters


def trainable_parameters(shape: ModelShape, lora: Lora | None, *, scalar: bool) -> int:
    """Return the parameters that are trained: all of them, or the adapters (and the scalar head)."""
    if lora is None:
        return model_parameters(shape, scalar=scalar)
    return shape.lora_parameters(lora) + (shape.hidden if scalar else 0)


def learner_memory(shape: ModelShape, dtype: str, trainable: int, tokens: int, *, lora: bool, scalar: bool) -> Memory:
    """Estimate one process that trains (`trainable` > 0) or scores a model.

    Covered: the weights (adapters included when `lora`); for the trained parameters a gradient, two Adam
    moments in fp32 and, in bfloat16, an fp32 master copy; the activations of one micro-batch of `tokens` tokens
    kept for the backward pass (all layers when training, one when scoring) with fp32 logits of every token.
    Not covered: allocator slack, the libraries themselves (about 1 GB), communication buffers.
    """
    size = BYTES[dtype]
    added = trainable if lora else 0
    master = 4 if dtype == "bfloat16" else 0
    per_layer = 8 * shape.hidden + 2 * shape.kv_width + 4 * shape.intermediate
    layers = shape.layers if trainable else 1
    logits = 0 if scalar else 4 * shape.vocabulary * (2 if trainable else 1)
    return Memory(
        weights=(model_parameters(shape, scalar=scalar) + added) * size,
        optimizer=trainable * (size + 8 + master),
        activations=tokens * (layers * per_layer * size + logits),
        kv_cache=0,
    )


def engine_memory(shape: ModelShape, dtype: str, sequences: int, length: int, kv_cache_gib: int | None) -> Memory:
    """Estimate one rollout replica: weights, and keys and values of `sequences` full-length sequences.

    `kv_cache_gib` is the fixed cache of vLLM on CPU; on a GPU (None) vLLM takes `gpu_memory_utilization` of the
    device and the figure says what of it the sequences need.
    """
    size = BYTES[dtype]
    needed = sequences * length * shape.layers * 2 * shape.kv_width * size
    return Memory(
        weights=shape.parameters * size,
        optimizer=0,
        activations=sequences * shape.vocabulary * 4,
        kv_cache=needed if kv_cache_gib is None else kv_cache_gib << 30,
    )


def _is_target(name: str, lora: Lora) -> bool:
    if lora.target_modules == "all-linear":
        return True
    return any(name == target or name.endswith(f".{target}") for target in lora.target_modules)
