"""Saved folders are ordinary Hugging Face folders with the same outputs."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rlhf.models import saving
from rlhf.models.loading import load_causal
from rlhf.models.saving import DType, save_merged
from rlhf.models.tokenizer import ChatTokenizer, load_tokenizer
from rlhf.models.tuning import apply_tuning, trainable_parameters
from rlhf.recipe.tuning_schema import Lora

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
    model = apply_tuning(base, Lora(r=4), seed=0)
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
    model = apply_tuning(load_causal(tiny_folder, "float32"), Lora(), seed=0)
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


@pytest.mark.parametrize("limit", [10**9, 100_000, 1])
def test_files_are_those_of_the_hub_library(tiny_folder: Path, tmp_path: Path, limit: int) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    (ours / "model-00001-of-00077.safetensors").write_text("an older model")
    (ours / "model.safetensors.index.json").write_text("an older index")
    (ours / "notes.txt").write_text("stays")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "SHARD", limit)
        saving.write_weights(iter(weights.items()), ours)
    save_torch_state_dict(weights, theirs, metadata={"format": "pt"}, max_shard_size=limit)
    names = {file.name for file in theirs.iterdir()}
    assert {file.name for file in ours.iterdir()} == names | {"notes.txt"}
    for name in names:
        if name.endswith(".json"):
            found, wanted = (json.loads((folder / name).read_text()) for folder in (ours, theirs))
            assert found["weight_map"] == wanted["weight_map"]
            assert found["metadata"]["total_size"] == wanted["metadata"]["total_size"]
        else:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_saving_holds_one_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD", 3000)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for index in range(12):
            tensor = torch.full((250,), float(index))
            alive.add(tensor)
            most = max(most, sum(item.nbytes for item in alive))
            yield f"w{index:02}", tensor

    saving.write_weights(weights(), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert most <= 3000 + 1000
