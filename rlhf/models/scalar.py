"""A language model with one number per position: reward model and critic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf.errors import RecipeError, TrainingError
from rlhf.models.loading import load_weights
from rlhf.models.tokenizer import load_tokenizer
from rlhf.models.tuning import unwrapped


class ScalarHead(nn.Linear):
    """A linear head whose product is float32 whatever its dtype: bfloat16 keeps three digits, scores need more."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states `[..., H]` to float32 `[..., outputs]`."""
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float())


def load_scalar(folder: Path, dtype: str, seed: int, **how: Any) -> PreTrainedModel:
    """Load a folder as a sequence classifier with one label, in evaluation mode; `how` is for `from_pretrained`.

    A saved reward model keeps its head. On a language model a fresh `score` head is drawn from
    N(0, 1/H) by `seed` (Stiennon et al. 2020, appendix B: standard deviation 1 / sqrt(H + 1)). The config has
    `rlhf_score_offset`, subtracted from the head's output, and the pad token that plain transformers needs to
    find the last real token. Raises RecipeError when the architecture has no linear `score` head.
    """
    model, missing = load_weights(AutoModelForSequenceClassification, folder, dtype, num_labels=1, **how)
    if not isinstance(getattr(model, "score", None), nn.Linear) or model.score.bias is not None:
        raise RecipeError(f"{folder}: {type(model).__name__} has no linear `score` head; use a decoder-only model")
    if missing - {"score.weight"}:
        raise RecipeError(f"{folder} lacks weights of its model: {', '.join(sorted(missing)[:5])}")
    old = model.score.weight
    model.score = ScalarHead(old.shape[1], 1, bias=False, device="meta")
    if missing:
        noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(old.shape[1])
        old.data.copy_(noise)
    model.score.weight = old
    model.config.rlhf_score_offset = float(getattr(model.config, "rlhf_score_offset", 0.0))
    model.config.pad_token_id = load_tokenizer(folder).pad_id
    return model


def scalars(model: PreTrainedModel | PeftModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the scalar at every position of the inputs of the model's forward pass, float32, `[B, T]` like its tokens.

    Position t has read the tokens up to and with t; what stands on padding means nothing.
    """
    plain = unwrapped(model)
    hidden = plain.base_model(**inputs).last_hidden_state
    return plain.score(hidden).squeeze(-1) - plain.config.rlhf_score_offset


@torch.no_grad()
def fold_standardisation(model: PreTrainedModel | PeftModel, mean: float, std: float) -> None:
    """Change the head so that `scalars` returns (before - mean) / std, also when it was saved and reloaded.

    The deviation goes into the weights (rounded to their dtype) and the mean into `rlhf_score_offset`, so plain
    transformers differs by that constant only, which no comparison sees. Raises TrainingError without spread.
    """
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        raise TrainingError(f"the reward model's scores cannot be standardised: mean {mean}, standard deviation {std}")
    plain = unwrapped(model)
    plain.score.weight.div_(std)
    plain.config.rlhf_score_offset = (plain.config.rlhf_score_offset + mean) / std


def set_offset(model: PreTrainedModel | PeftModel, offset: float) -> None:
    """Say what `scalars` subtracts from the head's output."""
    unwrapped(model).config.rlhf_score_offset = offset


def offset_of(model: PreTrainedModel | PeftModel) -> float:
    """Return what `scalars` subtracts from the head's output."""
    return float(unwrapped(model).config.rlhf_score_offset)
