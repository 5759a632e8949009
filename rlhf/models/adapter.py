"""What a model learned beside its base, as a PEFT folder holds it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from rlhf.models.merging import Gathered, buckets, leave_whole
from rlhf.models.tuning import ADAPTER, starts_from_base, trainable_parameters

HEAD = "score"


@torch.no_grad()
def adapter_weights(model: PeftModel, gathered: Gathered = leave_whole) -> Iterator[tuple[str, Tensor]]:
    """Yield the adapters alone, under the names of PEFT's `adapter_model.safetensors`, with a scalar head.

    They belong to the model as it was before it was adapted: PiSSA's twice as many directions take back what the
    first ones took out of it. As `merged_weights` else: cut parameters are made whole by `gathered`.
    """
    if model.active_peft_config.is_prompt_learning:
        with gathered(trainable_parameters(model)):
            yield from get_peft_model_state_dict(model, {}, save_embedding_layers=False).items()
    for bucket in buckets(_learned(model)):
        with gathered([part.weight for part in bucket]):
            heads = {part.name: part.weight for part in bucket if part.is_head}
            added = {part.name: _since_start(model, part) for part in bucket if not part.is_head}
            yield from heads.items()
            if added:
                yield from get_peft_model_state_dict(model, added, save_embedding_layers=False).items()


def adapter_config(model: PeftModel, base: Path | None = None) -> dict[str, Any]:
    """Return what PEFT writes to `adapter_config.json`, JSON values only; `base` is where the base model is."""
    config = copy.copy(model.peft_config[ADAPTER])
    if isinstance(config, LoraConfig) and starts_from_base(model):
        config.init_lora_weights = True
        config.r *= 2
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    settings = config.to_dict() | {"inference_mode": True}
    if base is not None:
        settings["base_model_name_or_path"] = str(base)
    if any(part.is_head for part in _learned(model)):
        settings["task_type"] = "SEQ_CLS"
        settings |= {"modules_to_save": [HEAD]} if "modules_to_save" in settings else {}
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    return json.loads(json.dumps(plain, default=str))


def save_adapter(
    model: PeftModel, folder: Path, base: Path, gathered: Gathered = leave_whole, write: bool = True
) -> None:
    """Write a PEFT folder that `PeftModel.from_pretrained` loads on the model of `base`.

    Where ranks hold parts of the model all of them call this, with their `gathered`, and one says `write`.
    """
    weights = {
        name: weight.to("cpu", copy=True).contiguous() for name, weight in adapter_weights(model, gathered) if write
    }
    if not write:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(adapter_config(model, base), indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Part:
    name: str
    weight: Tensor

    @property
    def is_head(self) -> bool:
        return HEAD in self.name.split(".")

    def parameters(self) -> list[Tensor]:
        return [self.weight]


def _learned(model: PeftModel) -> list[_Part]:
    """Return the trained tensors, but for what makes prompts, whose outcome alone is kept."""
    named = model.named_parameters()
    return [_Part(name, p) for name, p in named if p.requires_grad and not name.startswith("prompt_encoder.")]


def _since_start(model: PeftModel, part: _Part) -> Tensor:
    """Return a tensor as it is or, of PiSSA, a factor of B A - B0 A0: A above A0, or B beside -B0."""
    if not starts_from_base(model):
        return part.weight
    start = model.start[part.name].to(part.weight.device)
    rows = ".lora_A." in part.name
    return torch.cat([part.weight, start if rows else -start], dim=0 if rows else 1)
