"""The scalar head: fresh and saved, per position, and standardised."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rlhf.errors import RecipeError, TrainingError
from rlhf.models.loading import load_causal
from rlhf.models.saving import save_merged
from rlhf.models.scalar import fold_standardisation, load_scalar, scalars
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.models.tuning import apply_tuning
from rlhf.recipe.tuning_schema import Lora

TOKENS = torch.randint(6, 262, (3, 10), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([10, 4, 7])
MASK = torch.arange(10) < LENGTHS[:, None]


def values(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return scalars(model, {"input_ids": TOKENS, "attention_mask": MASK})


def plain_scores(model: PreTrainedModel) -> Tensor:
    """What a user of transformers gets: padding by the model's pad token, score of the last real token."""
    padded = TOKENS.masked_fill(~MASK, model.config.pad_token_id)
    with torch.no_grad():
        return model(input_ids=padded, attention_mask=MASK).logits[:, 0]


def test_fresh_head_is_drawn_by_seed_with_deviation_of_one_over_root_hidden(tiny_folder: Path) -> None:
    a, b, c = (load_scalar(tiny_folder, "float32", seed).score.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (1, 64)
    many = torch.cat([load_scalar(tiny_folder, "float32", seed).score.weight for seed in range(20)])
    assert many.std().item() == pytest.approx(1 / 8, rel=0.1)


def test_values_are_the_head_on_every_hidden_state(tiny_folder: Path) -> None:
    model = load_scalar(tiny_folder, "float32", seed=1)
    causal = load_causal(tiny_folder, "float32")
    with torch.no_grad():
        hidden = causal(input_ids=TOKENS[:1], output_hidden_states=True).hidden_states[-1]
    expected = hidden @ model.score.weight[0]
    torch.testing.assert_close(values(model)[:1], expected)
    assert values(model).shape == (3, 10)


def test_values_do_not_see_padding_or_the_future(tiny_folder: Path) -> None:
    model = load_scalar(tiny_folder, "float32", seed=1)
    together = values(model)
    for row, length in enumerate(LENGTHS.tolist()):
        with torch.no_grad():
            alone = scalars(model, {"input_ids": TOKENS[row : row + 1, :length]})
        torch.testing.assert_close(together[row, :length], alone[0])


def test_values_are_float32_with_a_bfloat16_model(tiny_folder: Path) -> None:
    model = load_scalar(tiny_folder, "bfloat16", seed=1)
    assert model.score.weight.dtype == torch.bfloat16
    with torch.no_grad():
        hidden = model.model(input_ids=TOKENS, attention_mask=MASK).last_hidden_state
    exact = hidden.double() @ model.score.weight.double()[0]
    assert values(model).dtype == torch.float32
    torch.testing.assert_close(values(model).double(), exact, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert values(model).dtype == torch.float32


def test_values_with_fresh_adapters_are_the_same(tiny_folder: Path) -> None:
    model = load_scalar(tiny_folder, "float32", seed=1)
    before = values(model)
    assert torch.equal(values(apply_tuning(model, Lora(), seed=1)), before)


@pytest.mark.parametrize("wrapped", [False, True])
def test_standardised_values_are_shifted_and_scaled_twice_over(tiny_folder: Path, wrapped: bool) -> None:
    model = load_scalar(tiny_folder, "float32", seed=1)
    target = apply_tuning(model, Lora(), seed=1) if wrapped else model
    before = values(target)
    fold_standardisation(target, mean=0.4, std=2.5)
    torch.testing.assert_close(values(target), (before - 0.4) / 2.5)
    fold_standardisation(target, mean=-1.0, std=0.5)
    torch.testing.assert_close(values(target), ((before - 0.4) / 2.5 + 1.0) / 0.5)


def test_standardised_scores_have_mean_zero_and_deviation_one(tiny_folder: Path) -> None:
    model = load_scalar(tiny_folder, "float32", seed=1)
    scores = values(model)[MASK]
    fold_standardisation(model, scores.mean().item(), scores.std().item())
    scores = values(model)[MASK]
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_no_spread_cannot_be_standardised(tiny_folder: Path, std: float) -> None:
    with pytest.raises(TrainingError, match="cannot be standardised"):
        fold_standardisation(load_scalar(tiny_folder, "float32", seed=1), 0.0, std)


def test_reward_model_survives_saving_and_plain_transformers_agrees_up_to_a_shift(
    tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    model = apply_tuning(load_scalar(tiny_folder, "float32", seed=1), Lora(), seed=1)
    fold_standardisation(model, mean=0.4, std=2.5)
    save_merged(model, tiny_tokenizer, tmp_path, "float32")
    reloaded = load_scalar(tmp_path, "float32", seed=99)
    assert torch.equal(values(reloaded), values(model))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == 1
    ours = values(reloaded)[torch.arange(3), LENGTHS - 1]
    torch.testing.assert_close(plain_scores(plain) - ours, torch.full((3,), 0.4 / 2.5))


def test_saved_bfloat16_head_keeps_its_order(tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    model = load_scalar(tiny_folder, "bfloat16", seed=1)
    before = values(model)
    fold_standardisation(model, mean=0.1, std=0.3)
    torch.testing.assert_close(values(model), (before - 0.1) / 0.3, rtol=0.02, atol=0.02)
    save_merged(model, tiny_tokenizer, tmp_path, "bfloat16")
    assert torch.equal(values(load_scalar(tmp_path, "bfloat16", seed=0)), values(model))


def test_pad_token_is_never_the_end_of_sequence(tiny_folder: Path) -> None:
    assert load_scalar(tiny_folder, "float32", seed=0).config.pad_token_id == 0


def test_other_architectures_work_and_headless_ones_say_so(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 262, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, **sizes)).save_pretrained(tmp_path / "gpt2")
    bert = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=262)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    for name in ("gpt2", "bert"):
        AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / name)
    assert values(load_scalar(tmp_path / "gpt2", "float32", seed=0)).shape == (3, 10)
    with pytest.raises(RecipeError, match="no linear `score` head"):
        load_scalar(tmp_path / "bert", "float32", seed=0)
