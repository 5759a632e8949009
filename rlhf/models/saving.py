"""Writing models as plain Hugging Face folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.merging import Gathered, leave_whole, merged_weights
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.models.tuning import unwrapped

DType = Literal["bfloat16", "float32"]

SHARD = 5 * 10**9
"""Bytes of a weights file, and of main memory that saving takes."""

INDEX = ".index.json"


def save_merged(
    model: PreTrainedModel | PeftModel,
    tokenizer: ChatTokenizer,
    folder: Path,
    dtype: DType,
    gathered: Gathered = leave_whole,
    write: bool = True,
) -> None:
    """Write a Hugging Face folder with the adapters merged, in `dtype`, that transformers and vLLM load.

    Merging happens before the cast, and the model itself does not change. The generation config stops at
    every end-of-sequence token of the chat tokenizer. Where ranks hold parts of the model all of them call this, with
    their `gathered`, and one says `write`.
    """
    if write:
        save_folder(model, tokenizer.hf, folder, dtype, tokenizer.eos_ids, gathered)
    else:
        for _ in merged_weights(model, gathered):
            pass


def save_folder(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: DType,
    eos_ids: tuple[int, ...] | None = None,
    gathered: Gathered = leave_whole,
) -> None:
    """Write weights (safetensors, in shards of `SHARD` bytes), config, generation config and tokenizer to `folder`.

    Unlike `save_pretrained` it accepts models that were dequantised while loading, and generation configs that
    transformers itself would not have written; `eos_ids`, where given, replace the end tokens in there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = getattr(torch, dtype)
    weights = (
        (name, weight.to("cpu", target if weight.is_floating_point() else weight.dtype, copy=True).contiguous())
        for name, weight in merged_weights(model, gathered)
    )
    write_weights(weights, folder)

    plain = unwrapped(model)
    config = copy.deepcopy(plain.config)
    config.architectures = [type(plain).__name__]
    config.dtype = target
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    if plain.can_generate():
        generation = copy.deepcopy(plain.generation_config)
        if eos_ids is not None:
            generation.eos_token_id = list(eos_ids)
        generation.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)


def write_weights(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write `model.safetensors`, or numbered files of at most `SHARD` bytes and their index, one file at a time.

    An older model in the folder is gone afterwards. A tensor above the limit gets a file of its own.
    """
    homes: list[list[str]] = []
    size = 0
    for number, shard in enumerate(_shards(weights)):
        save_file(shard, folder / f"part-{number}", metadata={"format": "pt"})
        homes.append(list(shard))
        size += sum(weight.nbytes for weight in shard.values())
        shard.clear()  # before the next one is filled
    for old in (*folder.glob("model-*-of-*.safetensors"), *(folder / f"model.safetensors{end}" for end in ("", INDEX))):
        old.unlink(missing_ok=True)
    count = len(homes)
    names = (
        ["model.safetensors"] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    for number, name in enumerate(names):
        (folder / f"part-{number}").rename(folder / name)
    if count > 1:
        places = {weight: name for name, home in zip(names, homes, strict=True) for weight in home}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        (folder / f"model.safetensors{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size = 0
    for name, weight in weights:
        if shard and size + weight.nbytes > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = weight
        size += weight.nbytes
    yield shard
