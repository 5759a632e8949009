"""A Hugging Face folder as a GGUF file, through llama.cpp's own writer and tensor names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf.quants import quant_shape_to_byte_shape, quantize
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlhf.errors import DataError, RecipeError
from rlhf.export.vocabulary import write_vocabulary
from rlhf.models.folder import loading
from rlhf.models.tokenizer import load_tokenizer

GgufType = Literal["bf16", "f16", "f32", "q8_0"]
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
STORED = {
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
LARGEST_F16 = 65504
HEAD = "lm_head.weight"


def write_gguf(folder: Path, file: Path, kind: GgufType, title: str, licence: str | None) -> None:
    """Write the model of a Hugging Face folder to `file`, one tensor in memory at a time.

    Matrices are stored as `kind` (float16 where the rows do not divide into the blocks of q8_0), vectors in float32, as
    llama.cpp asks. `title` and `licence` go into the metadata, as do tokenizer and chat template. Raises RecipeError
    for an architecture, a tokenizer or a setting that is not one of those known here.
    """
    with loading(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _check(config, folder)
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[arch])
    try:
        _describe(writer, config, kind, title, licence)
        try:
            write_vocabulary(writer, load_tokenizer(folder), config.vocab_size)
        except RecipeError as error:
            raise RecipeError(f"{folder}: {error}") from error
        with _weights(folder) as weights:
            _write_tensors(writer, config, arch, kind, weights)
    finally:
        writer.close()


def rope_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """Return by what the model divides its rotation frequencies, float32 `[head_dim / 2]`; None for 1 throughout."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") == "default":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    width = head_width(config)
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    return plain / scaled.float()


def head_width(config: PreTrainedConfig) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(config: PreTrainedConfig) -> int:
    """Return the tokens that the file may promise: those within a sliding window, as llama.cpp's graph has none."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _check(config: PreTrainedConfig, folder: Path) -> None:
    """Refuse what llama.cpp would run otherwise than transformers, by its name."""
    writes = any(name.endswith("ForCausalLM") for name in config.architectures or [])
    if config.model_type not in ARCHITECTURES or not writes:
        raise RecipeError(
            f"{folder}: {(config.architectures or [config.model_type])[0]} cannot be exported to GGUF; the families are"
            f" {', '.join(ARCHITECTURES)}; for others take --as merged and llama.cpp's convert_hf_to_gguf.py"
        )
    rope = config.rope_parameters or {}
    odd = {
        "attention_bias": config.model_type != "qwen2" and getattr(config, "attention_bias", False),
        "mlp_bias": getattr(config, "mlp_bias", False),
        f"hidden_act: {config.hidden_act}": config.hidden_act != "silu",
        f"rope_type: {rope.get('rope_type')}": rope.get("rope_type", "default") not in _known_ropes(config),
    }
    if wrong := [name for name, is_so in odd.items() if is_so]:
        raise RecipeError(f"{folder}: GGUF export does not know {config.model_type} with {wrong[0]}; take --as merged")


def _known_ropes(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return which kinds of rotation the family's graph in llama.cpp can be told of."""
    return ("default", "llama3") if ARCHITECTURES[config.model_type] == gguf.MODEL_ARCH.LLAMA else ("default",)


def _describe(
    writer: gguf.GGUFWriter, config: PreTrainedConfig, kind: GgufType, title: str, licence: str | None
) -> None:
    writer.add_type("model")
    writer.add_name(title)
    if licence:
        writer.add_license(licence)
    writer.add_file_type(STORED[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_rope_dimension_count(head_width(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


class Weights:
    """The tensors of a folder's safetensors files, by name, each read when it is asked for."""

    def __init__(self, files: dict[str, Any]) -> None:
        self.files = files

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Return a tensor in float32."""
        return self.files[name].get_tensor(name).float().numpy()


@contextmanager
def _weights(folder: Path) -> Iterator[Weights]:
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, "pt")) for file in sorted(folder.glob("*.safetensors"))]
        yield Weights({name: file for file in files for name in file.keys()})  # noqa: SIM118 (no mapping)


def _write_tensors(
    writer: gguf.GGUFWriter, config: PreTrainedConfig, arch: gguf.MODEL_ARCH, kind: GgufType, weights: Weights
) -> None:
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    wanted = [name for name in weights.files if name != HEAD or not config.tie_word_embeddings]
    factors = rope_factors(config)
    stored = {}
    for name in wanted:
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise RecipeError(f"{name} has no place in a GGUF file of {config.model_type}; take --as merged")
        stored[name] = _stored(weights.shape(name), kind)
        _announce(writer, place, weights.shape(name), stored[name])
    if factors is not None:
        _announce(writer, "rope_freqs.weight", tuple(factors.shape), gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in wanted:
        weight = _turned(weights.read(name), name, config) if arch == gguf.MODEL_ARCH.LLAMA else weights.read(name)
        if stored[name] == gguf.GGMLQuantizationType.F16 and np.abs(weight).max(initial=0) > LARGEST_F16:
            raise DataError(f"{name} has values above {LARGEST_F16}, which float16 cannot hold: use --type bf16")
        writer.write_tensor_data(np.ascontiguousarray(quantize(weight, stored[name])))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())


def _announce(writer: gguf.GGUFWriter, place: str, shape: tuple[int, ...], stored: gguf.GGMLQuantizationType) -> None:
    size = math.prod(quant_shape_to_byte_shape(shape, stored))
    writer.add_tensor_info(place, shape, np.dtype(np.float32), size, raw_dtype=stored)


def _stored(shape: tuple[int, ...], kind: GgufType) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    wanted = STORED[kind][0]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _turned(weight: np.ndarray, name: str, config: PreTrainedConfig) -> np.ndarray:
    """Return queries and keys with the rows of a head in llama.cpp's order: rotated pairs side by side.

    transformers rotates row i with row i + width / 2, llama.cpp's `llama` graph row 2 i with row 2 i + 1.
    """
    if name.rpartition(".")[0].endswith("q_proj"):
        heads = config.num_attention_heads
    elif name.rpartition(".")[0].endswith("k_proj"):
        heads = config.num_key_value_heads
    else:
        return weight
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)
