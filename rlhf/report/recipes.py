"""What two or more recipes do differently, in the keys that can change a result."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Where things run, are shown and are kept; and how much work is done at once, which no result depends on.
ELSEWHERE = {"name", "output_dir", "backend", "ray", "roles", "tracking"}
WORKLOAD = {"max_tokens_per_microbatch", "save_every"}
ABSENT = "-"


@dataclass(frozen=True)
class RecipeDifference:
    """A key such as `stages.ppo.kl_coef` and its value in each recipe, `-` where it is not there."""

    key: str
    values: tuple[str, ...]


def recipe_differences(
    recipes: Sequence[Mapping[str, Any]], folders: Sequence[Path | None] = ()
) -> list[RecipeDifference]:
    """Return the keys whose values differ between resolved recipes (plain mappings), in the order of the recipes.

    A stage is known by its name. One that a recipe does not have is one row with its kind, not a row for each key.
    `folders` holds the folder of each recipe's file, None where it is not known. A file that has the same place in
    both folders is no difference, nor is a file that both name: two clones of one recipe are equal.
    """
    flat = [dict(_flatten(recipe)) for recipe in recipes]
    places = [*folders, *[None] * (len(recipes) - len(folders))]
    near = [dict(_flatten(_relative(recipe, place))) for recipe, place in zip(recipes, places, strict=True)]
    lacking = [
        key
        for key in dict.fromkeys(key for row in flat for key in row if _is_stage(key))
        if not all(key in row for row in flat)
    ]
    found = []
    for key in dict.fromkeys(key for row in flat for key in row):
        if key not in lacking and any(key.startswith(f"{stage}.") for stage in lacking):
            continue
        values = tuple(row.get(key, ABSENT) for row in flat)
        beside = tuple(row.get(key, ABSENT) for row in near)
        if len(set(values)) > 1 and len(set(beside)) > 1:
            shown = (value if own.startswith(os.pardir) else own for value, own in zip(values, beside, strict=True))
            found.append(RecipeDifference(key, tuple(shown)))
    return found


def _relative(value: Any, folder: Path | None) -> Any:
    """Return a part of a recipe with its absolute paths relative to a folder."""
    if folder is None:
        return value
    if isinstance(value, Mapping):
        return {name: _relative(item, folder) for name, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    return os.path.relpath(value, folder) if isinstance(value, str) and os.path.isabs(value) else value


def _is_stage(key: str) -> bool:
    return key.startswith("stages.") and key.count(".") == 1


def _flatten(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in recipe.items():
        if name == "stages":
            for stage in value:
                place = f"stages.{stage['name']}"
                yield place, str(stage["kind"])
                rest = {key: item for key, item in stage.items() if key not in ("name", "kind")}
                yield from _leaves(place, rest)
        elif name not in ELSEWHERE:
            yield from _leaves(name, value)


def _leaves(place: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            if name not in WORKLOAD:
                yield from _leaves(f"{place}.{name}", item)
    elif value is not None and value not in ({}, []):
        yield place, str(value)
