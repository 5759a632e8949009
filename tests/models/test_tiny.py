"""The tiny model: what it promises to everything that is tested with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.models.tiny import build_tiny


def test_loads_in_plain_transformers_with_the_stated_shape(tiny_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32
    assert (model.config.hidden_size, model.config.head_dim, model.config.num_key_value_heads) == (64, 32, 1)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    # 262*64 embeddings; a layer: q and o 2*64*64, k and v 2*64*32, mlp 3*64*128, two norms; the last norm
    assert model.num_parameters() == 262 * 64 + 2 * (8192 + 4096 + 24576 + 128) + 64


def test_seed_decides_the_weights_and_nothing_else_does(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    build_tiny(tmp_path / "a", seed=3)
    torch.rand(5)
    build_tiny(tmp_path / "b", seed=3)
    build_tiny(tmp_path / "c", seed=4)
    torch.random.set_rng_state(before)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_bytes_are_six_plus_their_value(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert len(tokenizer) == 262
    assert tokenizer("aé<|im_end|>")["input_ids"] == [6 + 97, 6 + 0xC3, 6 + 0xA9, 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    "text", ["", "plain", "  two  spaces \n\n\ttabs ", "naïve 日本語 🙂 e\u0301", "\x00\x7f\r\n", "' s n't"]
)
def test_every_string_round_trips(tiny_folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    ids = tokenizer(text)["input_ids"]
    assert ids == [6 + byte for byte in text.encode()]
    assert tokenizer.decode(ids) == text
