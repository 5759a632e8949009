"""In what a finished model answers: as it is stored, or in float32 where this machine is slow at bfloat16."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf.recipe.base import Dtype
from rlhf.recipe.dtype import Here
from rlhf.recipe.resources import local_resources


def served_dtype(folder: Path) -> Dtype:
    """Return the dtype for a model folder here: float32 weights stay whole, others are as a run would hold them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("dtype") == "float32":
        return "float32"
    here = Here(local_resources().gpus)
    return (here.gpu if here.visible else here.cpu).dtype
