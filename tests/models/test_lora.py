"""Adapters: that they start as nothing, leave the base alone, and merge as peft itself would merge them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from rlhf.errors import RecipeError
from rlhf.models.loading import load_causal
from rlhf.models.merging import merged_weights
from rlhf.models.scalar import load_scalar
from rlhf.models.tuning import adapters_off, apply_tuning, trainable_parameters
from rlhf.recipe.tuning_schema import Lora

TOKENS = torch.randint(6, 262, (2, 12), generator=torch.Generator().manual_seed(1))


def adapted(folder: Path, dtype: str = "float32", kind: Literal["causal", "scalar"] = "causal") -> PeftModel:
    """A model whose adapters are not zero, as after training."""
    model = load_causal(folder, dtype) if kind == "causal" else load_scalar(folder, dtype, seed=2)
    peft = apply_tuning(model, Lora(r=4, alpha=10), seed=5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable_parameters(peft):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return peft


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fresh_adapters_change_nothing_and_have_the_models_dtype(tiny_folder: Path, dtype: str) -> None:
    plain = logits(load_causal(tiny_folder, dtype))
    peft = apply_tuning(load_causal(tiny_folder, dtype), Lora(), seed=0)
    assert torch.equal(logits(peft), plain)
    assert {parameter.dtype for parameter in peft.parameters()} == {getattr(torch, dtype)}


def test_all_linear_adapts_the_layers_but_not_the_head(tiny_folder: Path) -> None:
    peft = apply_tuning(load_causal(tiny_folder, "float32"), Lora(r=4), seed=0)
    names = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert len(names) == 2 * 7 * 2
    assert all("lora_" in name and "layers" in name for name in names)
    # r * (in + out): q 64+64, k and v 64+32, o 64+64, gate and up 64+128, down 128+64
    assert sum(p.numel() for p in trainable_parameters(peft)) == 2 * 4 * (128 + 96 + 96 + 128 + 192 * 3)


def test_scalar_trains_adapters_and_the_whole_head(tiny_folder: Path) -> None:
    peft = apply_tuning(load_scalar(tiny_folder, "float32", seed=0), Lora(r=4), seed=0)
    others = {n for n, p in peft.named_parameters() if p.requires_grad and "lora_" not in n}
    assert others == {"base_model.model.score.weight"}
    peft(input_ids=TOKENS).logits.sum().backward()
    assert peft.get_base_model().score.weight.grad is not None


def test_seed_decides_the_adapters_whatever_the_global_state(tiny_folder: Path) -> None:
    def first(seed: int) -> Tensor:
        return trainable_parameters(apply_tuning(load_causal(tiny_folder, "float32"), Lora(), seed))[0].detach()

    torch.manual_seed(1)
    a = first(3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    b = first(3)
    assert torch.equal(a, b)
    assert not torch.equal(a, first(4))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_off_is_the_base_bit_for_bit_and_ends(tiny_folder: Path, dtype: str) -> None:
    base = logits(load_causal(tiny_folder, dtype))
    peft = adapted(tiny_folder, dtype)
    before = logits(peft)
    trainable = len(trainable_parameters(peft))
    with adapters_off(peft):
        assert torch.equal(logits(peft), base)
    assert torch.equal(logits(peft), before)
    assert not torch.equal(before, base)
    assert len(trainable_parameters(peft)) == trainable


def test_adapters_off_needs_adapters(tiny_folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"roles\.reference\.share"):
        adapters_off(load_causal(tiny_folder, "float32"))


@pytest.mark.parametrize("kind", ["causal", "scalar"])
def test_merged_weights_are_those_of_merge_and_unload(tiny_folder: Path, kind: Literal["causal", "scalar"]) -> None:
    peft = adapted(tiny_folder, kind=kind)
    before = {name: tensor.clone() for name, tensor in peft.state_dict().items()}
    ours = dict(merged_weights(peft))
    after = peft.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs = copy.deepcopy(peft).merge_and_unload().state_dict()
    theirs.pop("lm_head.weight", None)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert ("score.weight" in ours) == (kind == "scalar")


def test_merge_in_bfloat16_rounds_once(tiny_folder: Path) -> None:
    peft = adapted(tiny_folder, "bfloat16")
    merged = dict(merged_weights(peft))["model.layers.0.mlp.up_proj.weight"]
    layer = peft.get_base_model().model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    exact = layer.base_layer.weight.double() + 10 / 4 * (b @ a)
    assert merged.dtype == torch.bfloat16
    # half a unit in the last of bfloat16's 8 bits, and float32's own rounding
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    peft_twice = copy.deepcopy(peft).merge_and_unload().state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert (merged.double() - exact).abs().sum() <= (peft_twice.double() - exact).abs().sum()


def test_plain_models_yield_their_checkpoint(tiny_folder: Path) -> None:
    from safetensors.torch import load_file

    checkpoint = load_file(tiny_folder / "model.safetensors")
    ours = dict(merged_weights(load_causal(tiny_folder, "float32")))
    assert ours.keys() == checkpoint.keys()
    assert all(torch.equal(ours[name], checkpoint[name]) for name in ours)


def test_fused_experts_get_their_checkpoint_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    checkpoint = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in checkpoint
    ours = dict(merged_weights(load_causal(tmp_path, "float32")))
    assert ours.keys() == checkpoint.keys()
    assert all(torch.equal(ours[name], checkpoint[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("target", "message"),
    [(["nothing_here"], "does not fit the model"), (["q_proj", "lm_head"], "embeddings or the head")],
)
def test_wrong_targets_are_recipe_errors(tiny_folder: Path, target: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        apply_tuning(load_causal(tiny_folder, "float32"), Lora(target_modules=target), seed=0)
