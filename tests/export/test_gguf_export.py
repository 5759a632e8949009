"""GGUF files written by us and read by others: transformers, and llama.cpp's own reader."""

from __future__ import annotations

import shutil

import gguf
import numpy as np
import pytest
import torch
from rollout_oracle import sharpen
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rlhf.errors import RecipeError
from rlhf.export.agreement import Agreement, Disagreement, compare
from rlhf.export.gguf import _turned, write_gguf
from rlhf.export.readback import check_gguf
from rlhf.models.tiny import BEGIN, PAD, TURN_END, byte_tokenizer

SHAPE = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": TURN_END,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True, head_dim=32),
    "llama3-rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
}


def build(config, folder, dtype=torch.float32, tokenizer=None, rows=None):
    """Save a random model whose predictions are sharp and whose biases are not zero."""
    torch.manual_seed(1)
    model = sharpen(AutoModelForCausalLM.from_config(config, dtype=dtype), 3.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight += 0.1 * torch.randn(weight.shape).to(weight.dtype)
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def write(folder, file, kind):
    write_gguf(folder, file, kind, "trial", "apache-2.0")
    return file


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_back_bit_for_bit(family, tmp_path):
    folder = build(FAMILIES[family], tmp_path / "model")
    agreement = check_gguf(write(folder, tmp_path / "m.gguf", "f32"), folder, "f32")
    assert agreement.exact
    assert agreement.spread > 0.1


@pytest.mark.parametrize(("kind", "exact"), [("bf16", True), ("f32", True), ("f16", False), ("q8_0", False)])
def test_types_keep_a_bfloat16_model_within_their_rounding(kind, exact, tmp_path):
    folder = build(FAMILIES["qwen2"], tmp_path / "model", torch.bfloat16)
    file = write(folder, tmp_path / "m.gguf", kind)
    agreement = check_gguf(file, folder, kind)
    assert agreement.exact == exact
    assert agreement.mean < 0.03 * agreement.spread
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert stored["blk.0.attn_q.weight"] == kind.upper()
    assert stored["blk.0.attn_q.bias"] == stored["output_norm.weight"] == "F32"


def test_rows_that_do_not_fill_blocks_are_stored_in_float16(tmp_path):
    folder = build(LlamaConfig(**SHAPE | {"intermediate_size": 80}), tmp_path / "model")
    file = write(folder, tmp_path / "m.gguf", "q8_0")
    check_gguf(file, folder, "q8_0")
    stored = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
    assert stored["blk.0.ffn_down.weight"] == "F16"
    assert stored["blk.0.ffn_up.weight"] == "Q8_0"


def test_queries_and_keys_are_turned_by_hand():
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    rows = np.arange(8.0)[:, None] * np.ones((1, 3))
    assert _turned(rows, "model.layers.0.self_attn.q_proj.weight", config)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert _turned(rows[:4], "model.layers.0.self_attn.k_proj.weight", config)[:, 0].tolist() == [0, 2, 1, 3]
    assert _turned(rows, "model.layers.0.self_attn.v_proj.weight", config) is rows


def test_the_metadata_say_what_llama_cpp_needs(tmp_path):
    folder = build(FAMILIES["llama"], tmp_path / "model")
    fields = gguf.GGUFReader(write(folder, tmp_path / "m.gguf", "bf16")).fields
    said = {name: fields[name].contents() for name in fields}
    assert said["general.architecture"] == "llama"
    assert said["general.license"] == "apache-2.0"
    assert said["llama.attention.head_count_kv"] == 2
    assert said["llama.rope.dimension_count"] == 16
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.eos_token_id"] == TURN_END
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert "<|im_start|>assistant" in said["tokenizer.chat_template"]
    types = said["tokenizer.ggml.token_type"]
    assert types[TURN_END] == gguf.TokenType.CONTROL
    assert types[100] == gguf.TokenType.NORMAL


def test_embeddings_beyond_the_tokenizer_are_named_as_unused(tmp_path):
    folder = build(LlamaConfig(**SHAPE | {"vocab_size": 272}), tmp_path / "model")
    file = write(folder, tmp_path / "m.gguf", "f32")
    assert check_gguf(file, folder, "f32").exact
    fields = gguf.GGUFReader(file).fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == "[PAD271]"
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == gguf.TokenType.UNUSED


def test_a_sliding_window_bounds_what_the_file_promises(tmp_path):
    folder = build(MistralConfig(**SHAPE, sliding_window=128), tmp_path / "model")
    fields = gguf.GGUFReader(write(folder, tmp_path / "m.gguf", "f32")).fields
    assert fields["llama.context_length"].contents() == 128


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LlamaConfig(**SHAPE, attention_bias=True), "attention_bias"),
        (LlamaConfig(**SHAPE, hidden_act="gelu"), "hidden_act: gelu"),
        (Qwen2Config(**SHAPE, rope_parameters=LLAMA3), "rope_type: llama3"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused_by_name(config, said, tmp_path):
    folder = build(config, tmp_path / "model")
    with pytest.raises(RecipeError, match=said):
        write(folder, tmp_path / "m.gguf", "f32")


def test_other_families_are_refused_by_name(tmp_path):
    from transformers import GemmaConfig

    folder = build(GemmaConfig(**SHAPE, head_dim=16), tmp_path / "model")
    with pytest.raises(RecipeError, match="GemmaForCausalLM cannot be exported to GGUF; the families are llama"):
        write(folder, tmp_path / "m.gguf", "f32")


def test_a_file_that_differs_is_caught(tmp_path):
    folder = build(FAMILIES["llama"], tmp_path / "model")
    file = write(folder, tmp_path / "m.gguf", "f32")
    other = build(LlamaConfig(**SHAPE | {"rope_theta": 500.0}), tmp_path / "other")
    with pytest.raises(Disagreement, match=r"rope\.freq_base"):
        check_gguf(file, other, "f32")
    data = bytearray(file.read_bytes())
    tensor = next(one for one in gguf.GGUFReader(file).tensors if one.name == "blk.1.attn_k.weight")
    half = tensor.n_bytes // 2
    start = int(tensor.data_offset)
    data[start : start + half], data[start + half : start + 2 * half] = (
        data[start + half : start + 2 * half],
        data[start : start + half],
    )
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(data)
    with pytest.raises(Disagreement, match="does not agree"):
        check_gguf(changed, folder, "f32")
    shutil.copy(file, tmp_path / "again.gguf")
    check_gguf(tmp_path / "again.gguf", folder, "f32")


def test_agreement_is_counted_by_hand():
    one, other = [torch.tensor([[0.0, 4.0]])], [torch.tensor([[1.0, 4.0]])]
    agreement = compare(one, other)
    assert agreement == Agreement(mean=0.5, largest=1.0, spread=pytest.approx(8**0.5))
    agreement.check(0.2, "this")
    with pytest.raises(Disagreement, match="this does not agree"):
        agreement.check(0.1, "this")
    with pytest.raises(Disagreement):
        agreement.check(0, "this")
    with pytest.raises(Disagreement, match="other shapes"):
        compare(one, [torch.zeros(2, 2)])
