"""How large the files of a model, and the numbers in its config, may be: what exceeds this is refused before use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.errors import RecipeError

MIB = 2**20
DEEPEST = 32
"""Levels of nesting in a config."""

LAYERS, HEADS, EXPERTS = 1_000, 2**14, 2**12
WIDTH, INNER_WIDTH = 2**18, 2**21
VOCABULARY, POSITIONS = 2**22, 2**27
COUNT, SIZE = 2**20, 2**27
"""For numbers of things, and for sizes, that go by names we do not know."""

KNOWN: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), (1, LAYERS)),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), (1, HEADS)),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim"), (1, WIDTH)),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size"), (1, INNER_WIDTH)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (0, EXPERTS)),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), (1, POSITIONS)),
    "vocab_size": (1, VOCABULARY),
}
"""Smallest and largest value by key: whole numbers, lists of them (one for each layer), or null."""

LAYERED = re.compile(r"(num|n)_\w*(layers?|blocks|stages)|\w*_layers|depth")
COUNTED = re.compile(r"(num|n)_\w+")
SIZED = re.compile(
    r"(max|d)_\w+|\w+_(size|dim|rank|width|length|positions|embeddings|heads|channels|features)|dim|width"
)


def check_files(folder: Path, said: str) -> None:
    """Refuse settings, templates and vocabularies of a size that no model needs."""
    for file in sorted(folder.iterdir()):
        if file.is_file():
            check_file(file, said)


def check_file(file: Path, said: str) -> None:
    """Refuse a file that is larger than one of its name needs to be."""
    limit, size = largest(file.name), file.stat().st_size
    if limit and size > limit:
        raise RecipeError(f"{said}: {file} has {size} bytes; {limit // MIB} MiB is the most we read")


def largest(name: str) -> int | None:
    """Return the most bytes that a file of this name may have; None for weights and what is never read."""
    if name == "config.json" or name == "generation_config.json" or name.endswith(".jinja"):
        return MIB
    if name.endswith("config.json"):
        return 16 * MIB  # some tokenizers list thousands of reserved tokens there
    if name.endswith(".index.json"):
        return 64 * MIB
    return 128 * MIB if name.endswith((".json", ".txt", ".model")) else None


def read_json(file: Path, said: str) -> Any:
    """Return what a JSON file of a model folder holds; RecipeError for other files, and too large or deep ones."""
    limit = largest(file.name) or MIB
    with file.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise RecipeError(f"{said}: {file} has more than {limit // MIB} MiB, the most we read")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{said}: {file} is not JSON: {error}") from error
    if _depth(value) > DEEPEST:
        raise RecipeError(f"{said}: {file} is nested more than {DEEPEST} levels deep")
    return value


def check_config(config: Any, file: Path, said: str) -> None:
    """Refuse a config whose sizes are no whole numbers or larger than any model's: work and memory follow them."""
    if not isinstance(config, dict):
        raise RecipeError(f"{said}: {file} is no JSON object")
    for key, value in _entries(config):
        if reason := _wrong(key, value):
            raise RecipeError(f"{said}: {file}: {key} {reason}, not {json.dumps(value)[:80]}")
    layers, experts = (_most(config, keys) for keys in (("layers", "layer"), ("experts",)))
    if layers * experts > 64 * LAYERS:
        raise RecipeError(f"{said}: {file}: {layers} layers of {experts} experts are more than {64 * LAYERS} in all")


def _wrong(key: str, value: Any) -> str:
    """Return what a size has to be, where it is not that."""
    least, most = -1, SIZE
    if key in KNOWN:
        least, most = KNOWN[key]
        if isinstance(value, list):
            return next((reason for item in value if (reason := _wrong(key, item))), "")
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            return f"must be a whole number from {least} to {most}"
    elif LAYERED.fullmatch(key):
        most = LAYERS
    elif COUNTED.fullmatch(key):
        most = COUNT
    elif not SIZED.fullmatch(key):
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= most:
        return f"must be from {least} to {most}"
    return ""


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the entries of a config and of the configs inside of it, such as `text_config`."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _entries(item)
    elif isinstance(value, list):
        for item in value:
            yield from _entries(item)


def _most(config: dict[str, Any], endings: tuple[str, ...]) -> int:
    found = (value for key, value in _entries(config) if key in KNOWN and key.endswith(endings))
    return max((value for value in found if isinstance(value, int)), default=0)


def _depth(value: Any) -> int:
    """Return how deep a JSON value is nested, without recursion."""
    depth, level = 0, [value]
    while level := [
        item
        for one in level
        if isinstance(one, dict | list)
        for item in (one.values() if isinstance(one, dict) else one)
    ]:
        depth += 1
        if depth > DEEPEST:
            break
    return depth
