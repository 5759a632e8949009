"""Whether a model folder from elsewhere is one that we read: safetensors and JSON, nothing that could run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import RecipeError, RlhfError
from rlhf.models.limits import check_config, check_files, read_json

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.msgpack", "*.h5", "*.joblib", "*.npz")


def check_folder(folder: Path, said: str) -> None:
    """Refuse a folder that is no model in safetensors, exceeds our limits, or wants code of its own to be run.

    `said` is how the recipe calls it; RecipeErrors begin with it.
    """
    if (folder / "adapter_config.json").is_file():
        raise RecipeError(f"{said}: {folder} holds an adapter (adapter_config.json); merge it into its base first")
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{said}: {folder} is not a Hugging Face folder (no config.json)")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
        why = f"; {pickles[0]} may run code when it is read, so it is not" if pickles else ""
        raise RecipeError(f"{said}: {folder} has no safetensors weights{why}; convert them first")
    check_files(folder, said)
    for file in sorted(folder.glob("*.json")):
        if file.name.endswith("config.json") and _names_code(read_json(file, said)):
            raise RecipeError(
                f"{said}: {file} asks for code of the model's own (auto_map), which is never run; where transformers"
                " knows the architecture itself, remove auto_map from a copy of the folder"
            )
    if (folder / INDEX).is_file():
        _check_index(folder, said)
    config = read_json(folder / "config.json", said)
    check_config(config, folder / "config.json", said)
    stored_bytes(folder)


def stored_bytes(folder: Path) -> int:
    """Return how many bytes of weights a folder holds; RecipeError where a header promises what its file lacks."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with loading(file), safe_open(file, framework="np"):
            pass  # it compares the header with the file
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Make what a library raises about the files of a model folder a RecipeError in one line."""
    try:
        yield
    except RlhfError:
        raise
    except Exception as error:  # files that are made to be odd make libraries raise anything
        if type(error).__name__ == "OutOfMemoryError":
            raise  # an accelerator's, which says nothing about the files
        why = next(iter(str(error).strip().splitlines()), "")[:300]
        raise RecipeError(f"{folder}: cannot be loaded: {type(error).__name__}: {why}") from error


def _check_index(folder: Path, said: str) -> None:
    """Refuse an index of weights that leads out of the folder, or to anything but safetensors."""
    index = read_json(folder / INDEX, said)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise RecipeError(f"{said}: {folder / INDEX} has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise RecipeError(f"{said}: {folder / INDEX} names {name!r}, which is no safetensors file in the folder")


def _names_code(value: Any) -> bool:
    """Return whether `auto_map` stands anywhere in a config: those of a model's parts lie inside of its own."""
    if isinstance(value, dict):
        return bool(value.get("auto_map")) or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))
