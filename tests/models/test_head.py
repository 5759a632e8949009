"""Heads that are one product are told from those that add, scale or cap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.models.head import plain_head
from rlhf.models.loading import load_causal
from rlhf.models.tuning import apply_tuning
from rlhf.recipe.tuning_schema import Lora

SMALL: dict[str, Any] = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name: str, **settings: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**SMALL | settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "GPT2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_head_gives_its_weight(name: str, tied: bool) -> None:
    sizes = {"GPT2": {"n_embd": 64, "n_head": 4, "n_layer": 1}}
    model = build(name, tie_word_embeddings=tied, **sizes.get(name, {}))
    assert plain_head(model) is model.get_output_embeddings().weight


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Granite", {"logits_scaling": 8.0}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 30.0}),
        ("Phi", {}),
        ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    ],
)
def test_a_head_that_does_more_gives_none(name: str, settings: dict[str, Any]) -> None:
    assert plain_head(build(name, **settings)) is None


def test_the_model_is_left_as_it_was(tiny_folder: Path) -> None:
    model = load_causal(tiny_folder, "float32")
    tokens = torch.tensor([[7, 8, 9]])
    before = model(input_ids=tokens).logits
    plain_head(model)
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_adapters_in_the_layers_leave_the_head_plain(tiny_folder: Path) -> None:
    model = apply_tuning(load_causal(tiny_folder, "float32"), Lora(r=2, alpha=4), seed=1)
    assert plain_head(model) is model.get_base_model().lm_head.weight
