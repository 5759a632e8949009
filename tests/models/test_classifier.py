"""The classification head: fresh and saved, flat and padded, and what plain transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from rlhf.data.classes import ClassBatch
from rlhf.data.collate import collate
from rlhf.data.sequences import TokenSequence
from rlhf.engines.objectives import Classify, Confusion
from rlhf.engines.scoring import class_logits, short_attention
from rlhf.errors import RecipeError
from rlhf.models.classifier import load_classifier
from rlhf.models.flat_attention import runs_flat, use_flat_attention
from rlhf.models.saving import save_merged
from rlhf.models.scalar import load_scalar
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.models.tuning import apply_tuning
from rlhf.recipe.tuning_schema import Full, Lora, PromptTuning, Tuning

LABELS = ("bad", "good", "so-so")
LENGTHS = (10, 4, 7)
TOKENS = torch.randint(6, 262, (3, 10), generator=torch.Generator().manual_seed(1)).tolist()
ROWS = [TokenSequence(tuple(row[:n]), (False,) * n) for row, n in zip(TOKENS, LENGTHS, strict=True)]
BATCH = collate(ROWS, pad_id=0)


def plain_logits(folder: Path) -> Tensor:
    """What a user of transformers gets, with padding found by the model's pad token."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=BATCH.tokens, attention_mask=BATCH.attention_mask).logits.float()


def test_a_fresh_head_is_drawn_by_seed_and_small(tiny_folder: Path) -> None:
    a, b, c = (load_classifier(tiny_folder, "float32", LABELS, seed).score.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (3, 64)
    assert a.std().item() == pytest.approx(0.02, rel=0.15)


def test_logits_are_the_head_on_the_last_real_token_flat_or_padded(tiny_folder: Path) -> None:
    flat = load_classifier(tiny_folder, "float32", LABELS, 1)
    padded = load_classifier(tiny_folder, "float32", LABELS, 1)
    use_flat_attention(flat)
    assert (runs_flat(flat), runs_flat(padded)) == (True, False)
    with torch.no_grad():
        hidden = padded.model(BATCH.tokens, attention_mask=BATCH.attention_mask).last_hidden_state
        expected = torch.stack([hidden[row, n - 1] @ padded.score.weight.T for row, n in enumerate(LENGTHS)])
        for model in (flat, padded):
            torch.testing.assert_close(class_logits(model, BATCH), expected)
        alone = torch.cat([class_logits(flat, collate([row], 0)) for row in ROWS])
    torch.testing.assert_close(alone, expected)


def test_logits_are_float32_with_a_bfloat16_model(tiny_folder: Path) -> None:
    model = load_classifier(tiny_folder, "bfloat16", LABELS, 1)
    assert model.score.weight.dtype == torch.bfloat16
    with torch.no_grad(), short_attention(BATCH):
        hidden = model.model(BATCH.tokens, attention_mask=BATCH.attention_mask).last_hidden_state
        exact = torch.stack(
            [hidden[row, n - 1].double() @ model.score.weight.double().T for row, n in enumerate(LENGTHS)]
        )
        found = class_logits(model, BATCH)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


def test_prompts_before_the_text_move_the_last_token(tiny_folder: Path) -> None:
    """Padding changes nothing where learned tokens stand before the text."""
    model = apply_tuning(load_classifier(tiny_folder, "float32", LABELS, 1), PromptTuning(kind="prompt_tuning"), 1)
    with torch.no_grad():
        together = class_logits(model, BATCH)
        alone = torch.cat([class_logits(model, collate([row], 0)) for row in ROWS])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tuning", [Lora(r=4), Full(kind="full")], ids=lambda tuning: tuning.kind)
def test_plain_transformers_loads_what_is_saved_with_equal_logits(
    tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path, tuning: Tuning, dtype: str
) -> None:
    model = apply_tuning(load_classifier(tiny_folder, dtype, LABELS, 1), tuning, 1)
    save_merged(model, tiny_tokenizer, tmp_path, dtype)
    with torch.no_grad():
        ours = class_logits(model.eval(), BATCH)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(plain_logits(tmp_path), ours, **close)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "so-so"}
    assert config["label2id"] == {"bad": 0, "good": 1, "so-so": 2}
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    reloaded = load_classifier(tmp_path, dtype, LABELS, 99)
    with torch.no_grad():
        assert torch.equal(class_logits(reloaded, BATCH), ours)


def test_a_pipeline_of_transformers_names_the_labels(
    tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    model = load_classifier(tiny_folder, "float32", LABELS, 1)
    save_merged(model, tiny_tokenizer, tmp_path, "float32")
    text = "Schön 👍🏽"
    with torch.no_grad():
        tokens = tuple(tiny_tokenizer.text_ids(text))
        expected = class_logits(model, collate([TokenSequence(tokens, (False,) * len(tokens))], 0)).softmax(1)[0]
    classify = pipeline("text-classification", str(tmp_path), top_k=None)
    found = {one["label"]: one["score"] for one in classify([text])[0]}
    assert found == pytest.approx(dict(zip(LABELS, expected.tolist(), strict=True)), abs=1e-6)


def test_a_classifier_of_other_labels_and_other_models_are_refused(
    tiny_folder: Path, tiny_tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    save_merged(load_classifier(tiny_folder, "float32", LABELS, 1), tiny_tokenizer, tmp_path / "own", "float32")
    with pytest.raises(RecipeError, match=r"own is a classifier of bad, good, so-so, and the data have bad, good$"):
        load_classifier(tmp_path / "own", "float32", LABELS[:2], 1)
    save_merged(load_scalar(tiny_folder, "float32", 1), tiny_tokenizer, tmp_path / "reward", "float32")
    with pytest.raises(RecipeError, match="is a classifier of LABEL_0"):
        load_classifier(tmp_path / "reward", "float32", LABELS, 1)
    bert = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=262)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "bert")
    with pytest.raises(RecipeError, match="no linear `score` head"):
        load_classifier(tmp_path / "bert", "float32", LABELS, 1)


class Given(torch.nn.Module):
    """Says what it is told to."""


def test_the_objective_is_cross_entropy_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    monkeypatch.setattr("rlhf.engines.objectives.class_logits", lambda model, batch: logits)
    batch = ClassBatch(BATCH, torch.tensor([0, 1, 2]))
    loss, metrics = Classify().loss(Given(), batch)
    first, second, third = 3, 2.718281828**2 + 2, (148.4131591 + 2) / 148.4131591
    assert loss.item() == pytest.approx(sum(torch.tensor([first, second, third]).log().tolist()), rel=1e-6)
    assert metrics["loss"] == pytest.approx(loss.item() / 3)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert Classify().count(batch) == 3
    _, counted = Confusion().loss(Given(), batch)
    assert {name: total for name, (total, _) in counted.sums.items()} == {"0>0": 1, "1>0": 1, "2>2": 1}
    assert counted.merge(counted).sums["1>0"][0] == 2
