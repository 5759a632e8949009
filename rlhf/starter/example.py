"""Recipes that come with this package, written out with their data and rewards as a folder to begin with."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf.errors import RecipeError

EXAMPLES = Path(__file__).parent / "examples"
"""A folder for each example, its recipe named like it. In a clone their files are links to those of recipes/."""


def write_example(name: str, folder: Path, force: bool) -> list[Path]:
    """Write an example to a folder, which is made where it is missing; return the files, the recipe first.

    Raises RecipeError, before anything is written, where one of them is there already and `force` is not given.
    """
    source = EXAMPLES / name
    recipe = Path(f"{name}.yaml")
    others = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file() and _ships(path))
    inner = [recipe, *(path for path in others if path != recipe)]
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is a file: name a folder for the example")
    there = [str(folder / path) for path in inner if (folder / path).exists()]
    if there and not force:
        raise RecipeError(f"{', '.join(there)}: there already; name another folder, or --force overwrites")
    for path in inner:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
    return [folder / path for path in inner]


def _ships(path: Path) -> bool:
    return "__pycache__" not in path.parts
