"""Saved folders are ordinary Hugging Face folders with the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf.models.loading import load_causal
from rlhf.models.lora import add_lora, trainable_parameters
from rlhf.models.saving import DType, save_merged
from rlhf.models.tokenizer import ChatTokenizer, load_tokenizer
from rlhf.recipe.base import Lora

TOKENS = torch.arange(6, 46).reshape(2, 20)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_plain_model_reloads_bit_for_bit(tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    model = load_causal(tiny_folder, "float32")
    save_merged(model, tiny_tokenizer, tmp_path, "float32")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_adapted_model_reloads_merged(tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    base = load_causal(tiny_folder, "float32")
    untouched = logits(base)
    model = add_lora(base, Lora(r=4), "causal", seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    save_merged(model, tiny_tokenizer, tmp_path, "float32")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(reloaded) - untouched).abs().max() > 0.01
    names = load_file(tmp_path / "model.safetensors").keys()
    assert names == load_file(tiny_folder / "model.safetensors").keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_config_tells_what_was_saved(
    tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path, dtype: DType
) -> None:
    model = add_lora(load_causal(tiny_folder, "float32"), Lora(), "causal", seed=0)
    save_merged(model, tiny_tokenizer, tmp_path, dtype)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], dtype)
    assert config["tie_word_embeddings"] is True
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == getattr(torch, dtype)
    assert model.get_base_model().config.dtype == torch.float32


def test_tokenizer_and_end_tokens_travel(tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    two_ends = ChatTokenizer(tiny_tokenizer.hf, pad_id=0, eos_ids=(2, 5))
    model = load_causal(tiny_folder, "float32")
    model.generation_config.temperature = 0.5  # without do_sample: transformers refuses to save such a config
    save_merged(model, two_ends, tmp_path, "float32")
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 5]
    reloaded = load_tokenizer(tmp_path)
    assert reloaded.eos_ids == (2, 5)
    messages = [{"role": "user", "content": "Hi"}]
    assert reloaded.prompt_ids(messages) == tiny_tokenizer.prompt_ids(messages)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tiny_tokenizer.hf.chat_template


def test_saving_twice_leaves_one_model(tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    model = load_causal(tiny_folder, "float32")
    save_merged(model, tiny_tokenizer, tmp_path, "float32")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    save_merged(model, tiny_tokenizer, tmp_path, "float32")
    assert torch.equal(logits(load_causal(tmp_path, "float32")), logits(model))
