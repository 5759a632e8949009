"""How many parameters each tuning method trains and adds, of a model of some shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from rlhf.recipe.tuning_schema import (
    AnyLora,
    Bitfit,
    Full,
    Ia3,
    Layers,
    LlamaAdapter,
    Lora,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Qlora,
    Tuning,
)

if TYPE_CHECKING:
    from rlhf.recipe.model_shape import ModelShape

KEYS_AND_VALUES = ("k_proj", "v_proj")
FEED_FORWARD = ("down_proj", "fc2")
"""Names of the linear layers that IA3 scales: the outputs of the first, the inputs of the second."""

BLOCK = 64
"""Weights that share a scale in NF4."""

SCALES = 256
"""Scales that share one of their own where they are quantised too (Dettmers et al. 2023, section 3)."""


def targets(shape: ModelShape, lora: AnyLora) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the layers that get low-rank adapters."""
    wanted = lora.target_modules
    return [size for name, size in shape.linears.items() if wanted == "all-linear" or named(name, wanted)]


def named(name: str, ends: str | list[str] | tuple[str, ...]) -> bool:
    """Return whether a module is one of those that are told by the ends of their names, as PEFT tells them."""
    return any(name == end or name.endswith(f".{end}") for end in ([ends] if isinstance(ends, str) else ends))


def layer_numbers(tuning: Layers, layers: int) -> list[int]:
    """Return the numbers of the layers that train, of a model of so many."""
    if tuning.last is not None:
        return list(range(max(0, layers - tuning.last), layers))
    return sorted({number for number in tuning.indices or () if number < layers})


def added(shape: ModelShape, tuning: Tuning) -> int:
    """Return the parameters that a method adds to the model."""
    match tuning:
        case Lora() | Qlora():
            found = targets(shape, tuning)
            lengths = sum(outputs for _, outputs in found) if isinstance(tuning, Lora) and tuning.dora else 0
            return lengths + tuning.r * sum(inputs + outputs for inputs, outputs in found)
        case Ia3():
            outputs = sum(size[1] for name, size in shape.linears.items() if named(name, KEYS_AND_VALUES))
            return outputs + sum(size[0] for name, size in shape.linears.items() if named(name, FEED_FORWARD))
        case LlamaAdapter():
            return (tuning.layers or shape.layers) * (tuning.tokens * shape.hidden + 1)
        case PrefixTuning():
            return tuning.virtual_tokens * shape.layers * 2 * shape.kv_width
        case PromptTuning():
            return tuning.virtual_tokens * shape.hidden
        case PTuning():
            hidden, inner = shape.hidden, tuning.encoder_size
            network = (hidden + 1) * inner + (inner + 1) * inner + (inner + 1) * hidden
            return tuning.virtual_tokens * hidden + network
        case Full() | Bitfit() | Layers():
            return 0
    assert_never(tuning)


def chosen(shape: ModelShape, tuning: Tuning, body: int) -> int:
    """Return the parameters that a method trains, but for a score head; `body` are those of the model itself."""
    match tuning:
        case Full():
            return body
        case Bitfit():
            return shape.biases
        case Layers():
            numbers = layer_numbers(tuning, shape.layers)
            return sum(shape.layer_sizes[number] for number in numbers) + (shape.last_norm if tuning.norm else 0)
    return added(shape, tuning)


def quantised(shape: ModelShape, tuning: Tuning) -> int:
    """Return the weights that are kept in 4 bits."""
    if not isinstance(tuning, Qlora):
        return 0
    return sum(inputs * outputs for inputs, outputs in shape.linears.values())


def packed_bytes(tuning: Qlora) -> float:
    """Return the bytes of a 4-bit weight: half a byte and its part of the scale, float32 or itself in 8 bits."""
    scale = 1 + 4 / SCALES if tuning.double_quantisation else 4
    return 0.5 + scale / BLOCK
