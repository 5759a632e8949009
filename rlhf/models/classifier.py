"""A language model that tells classes apart by what it has read of a text at its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.errors import RecipeError
from rlhf.models.loading import load_weights
from rlhf.models.scalar import ScalarHead
from rlhf.models.tokenizer import load_tokenizer

DEVIATION = 0.02
"""Of a fresh head's weights, as transformers draws them: all classes begin about equally likely."""


def load_classifier(folder: Path, dtype: str, labels: Sequence[str], seed: int, **how: Any) -> PreTrainedModel:
    """Load a folder as a sequence classifier over `labels`, in evaluation mode; `how` is for `from_pretrained`.

    On a language model a fresh `score` head, `[C, H]`, is drawn from N(0, 0.02^2) by `seed`; a saved classifier of
    the same labels keeps its own. The config has `id2label` and `label2id`, and the pad token that plain transformers
    needs to find the last real token. Raises RecipeError when the architecture has no linear `score` head, or when the
    folder holds a classifier of other labels.
    """
    saved = _saved_labels(folder)
    if saved is not None and saved != list(labels):
        raise RecipeError(f"{folder} is a classifier of {', '.join(saved)}, and the data have {', '.join(labels)}")
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    settings = {"problem_type": "single_label_classification", **names, **how}
    model, missing = load_weights(AutoModelForSequenceClassification, folder, dtype, **settings)
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.bias is not None:
        raise RecipeError(f"{folder}: {type(model).__name__} has no linear `score` head; use a decoder-only model")
    if missing - {"score.weight"}:
        raise RecipeError(f"{folder} lacks weights of its model: {', '.join(sorted(missing)[:5])}")
    weight = model.score.weight
    model.score = ScalarHead(weight.shape[1], weight.shape[0], bias=False, device="meta")
    if missing:
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * DEVIATION
        weight.data.copy_(noise)
    model.score.weight = weight
    model.config.pad_token_id = load_tokenizer(folder).pad_id
    return model


def _saved_labels(folder: Path) -> list[str] | None:
    """Return the labels of a folder that holds a sequence classifier, by number; None for another model."""
    config: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return None
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return [names[number] for number in sorted(names, key=int)]
