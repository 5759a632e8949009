"""A stage's merged model as a folder of its own, and its adapter; both verified."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from rlhf.errors import RecipeError
from rlhf.export.agreement import Agreement, compare, load_plain, load_words, logits, probe_tokens
from rlhf.export.folders import copy_whole, forget_places
from rlhf.export.source import FinishedStage
from rlhf.models.folder import loading
from rlhf.models.quantised import keep_packing, quantisation
from rlhf.recipe.tuning_schema import Qlora

ROUNDED = 0.02
"""Share of the spread by which merged weights in bfloat16 may move the logits of the adapter on its base."""
FLOAT = 1e-3
"""The same where the merged weights are float32."""


def export_merged(stage: FinishedStage, folder: Path, verify: bool) -> Agreement | None:
    """Copy the merged model to `folder`, and compare the logits of the copy with the stage's, bit for bit."""
    source = stage.merged()
    copy_whole(source, folder, stage.seals(source))
    forget_places(folder)
    if not verify:
        return None
    tokens = _tokens(source)
    agreement = compare(logits(load_plain(source), tokens), logits(load_plain(folder), tokens))
    agreement.check(0, "the copied model")
    return agreement


def export_adapter(stage: FinishedStage, folder: Path, base: str, verify: bool) -> Agreement | None:
    """Copy the adapter to `folder`, for a base that is called `base`, and compare it there with the merged model.

    All is computed in float32, so what differs is how the merged weights were rounded. None where the method cannot be
    merged, as there is nothing to compare with, or `verify` is off.
    """
    source = stage.adapter
    if source is None:
        kind = stage.tuning.get("kind", "full")
        raise RecipeError(f"stage {stage.name} left no adapter (tuning: {kind}); take the whole model with --as merged")
    copy_whole(source, folder, stage.seals(source))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's own, with the path of the base on this machine
    forget_places(folder, base)
    if not verify:
        return None
    start = stage.start()
    with loading(folder):
        adapted = PeftModel.from_pretrained(_base(stage, start), folder, local_files_only=True).eval()
    tokens = _tokens(start)
    found = logits(adapted, tokens)
    del adapted
    if stage.model is None:
        return None
    agreement = compare(logits(load_plain(stage.model, torch.float32), tokens), found)
    rounded = load_plain(stage.model).dtype != torch.float32
    agreement.check(ROUNDED if rounded else FLOAT, "the adapter on its base")
    return agreement


def _base(stage: FinishedStage, start: Path) -> PreTrainedModel:
    """Return what the adapter was trained on, in float32; with linear layers in 4 bits where it was so trained."""
    tuning = Qlora.model_validate(stage.tuning) if stage.tuning.get("kind") == "qlora" else None
    model = load_plain(start, torch.float32, like=stage.model, **quantisation(tuning, "float32"))
    keep_packing(model)
    return model


def _tokens(folder: Path) -> list[list[int]]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return probe_tokens(load_words(folder), config.get("max_position_embeddings"))
