"""A GGUF file read back by transformers and compared with the folder that it was written from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig

from rlhf.export.agreement import (
    PROBES,
    Agreement,
    Disagreement,
    compare,
    load_plain,
    load_words,
    logits,
    probe_tokens,
)
from rlhf.export.gguf import GgufType, context_length, head_width, rope_factors
from rlhf.models.folder import loading
from rlhf.models.tokenizer import ChatTokenizer, load_tokenizer

TOLERANCE: dict[tuple[str, GgufType], float] = {
    ("float32", "f32"): 0,
    ("bfloat16", "f32"): 0,
    ("bfloat16", "bf16"): 0,
    ("float16", "f32"): 0,
    ("float16", "f16"): 0,
    ("float32", "f16"): 0.005,
    ("bfloat16", "f16"): 0.005,
}
"""Mean difference of logits that a type may make, as a share of their spread, by the dtype of the source."""
ROUNDED = 0.05
"""The same for what rounds more: bfloat16 of other dtypes, and q8_0."""
CHAT = (
    {"role": "user", "content": "Say hello in 2 languages."},
    {"role": "assistant", "content": "Hello! 你好！"},
    {"role": "user", "content": "Thanks, goodbye."},
)


def check_gguf(file: Path, folder: Path, kind: GgufType) -> Agreement:
    """Compare a GGUF file's logits, tokens, chat template and metadata with the folder's.

    Both run in float32, so nothing but how the file stores the weights sets them apart: where its type holds the
    source's values they are equal bit for bit, otherwise within `TOLERANCE`. Raises Disagreement where they are not.
    """
    with loading(folder):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    _check_metadata(file, config)
    _check_words(file, load_tokenizer(folder))
    source = load_plain(folder, torch.float32)
    tokens = probe_tokens(load_words(folder), context_length(config))
    ours = logits(source, tokens)
    del source
    agreement = compare(ours, logits(_read_model(file, config), tokens))
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    agreement.check(TOLERANCE.get((dtype, kind), ROUNDED), file.name)
    return agreement


def _read_model(file: Path, source: PreTrainedConfig) -> torch.nn.Module:
    """Load the file in float32; what transformers' reader does not take from it (`_check_metadata` does) is given."""
    with loading(file):
        config = AutoConfig.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
        )
        if rope_factors(source) is not None:
            config.rope_parameters = source.rope_parameters
        if config.model_type == "qwen3":
            config.head_dim = head_width(source)
        return AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=config,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=True,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()


def _check_metadata(file: Path, config: PreTrainedConfig) -> None:
    reader = gguf.GGUFReader(file)
    arch = reader.fields["general.architecture"].contents()
    wanted = {
        "attention.key_length": head_width(config),
        "attention.value_length": head_width(config),
        "rope.dimension_count": head_width(config),
        "rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
        "context_length": context_length(config),
    }
    for name, value in wanted.items():
        if reader.fields[f"{arch}.{name}"].contents() != value:
            raise Disagreement(f"{file.name}: {name} is not {value}")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    factors = rope_factors(config)
    if factors is not None and not np.array_equal(stored["rope_freqs.weight"], factors.numpy()):
        raise Disagreement(f"{file.name}: rope_freqs differ from the model's")


def _check_words(file: Path, tokenizer: ChatTokenizer) -> None:
    with loading(file):
        theirs = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False, local_files_only=True
        )
    for text in (*PROBES, tokenizer.hf.apply_chat_template(list(CHAT), tokenize=False)):
        ours = tokenizer.hf(text, add_special_tokens=False)["input_ids"]
        read = theirs(text, add_special_tokens=False)["input_ids"]
        if read != ours or theirs.decode(ours) != tokenizer.hf.decode(ours):
            raise Disagreement(f"{file.name}: transformers reads a tokenizer from it that differs on {text[:30]!r}")
    if theirs.chat_template != tokenizer.hf.chat_template:
        raise Disagreement(f"{file.name}: the chat template was not kept")
    if theirs.eos_token_id != tokenizer.eos_ids[0]:
        raise Disagreement(f"{file.name}: answers end with another token")
