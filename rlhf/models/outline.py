"""A model without its weights: built where no memory is taken, and compared with what its files hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import RecipeError
from rlhf.models.folder import loading, stored_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SLACK = 2**27
"""Numbers that a model may have beside those in its files: fresh heads, masks, tables of positions."""


def outline(
    folder: Path, auto_class: Any = None, *, gguf: str | None = None, room: int | None = None
) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """Return a model folder's config and its model on the meta device, by default a causal language model.

    `gguf` names the file of that kind in the folder that describes the model instead. RecipeError where the files
    cannot be read, or where the model would have more than `room` weights, by default two for each stored byte, as
    many as the densest packing holds: libraries fill what is missing with random numbers before they say so. A folder
    without weights, which only a plan reads, is not compared.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    described = {} if gguf is None else {"gguf_file": gguf}
    with loading(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **described)
        model = (auto_class or AutoModelForCausalLM).from_config(
            config, trust_remote_code=False, attn_implementation="sdpa"
        )
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    stored = stored_bytes(folder) if room is None else 0
    room = room or 2 * stored
    if room and wanted > room + SLACK:
        raise RecipeError(
            f"{folder}: the config describes a model of {wanted} weights, and its files hold {room} at most; they are"
            " not of one model"
        )
    return config, model
