"""What two or more recipes do differently, in the keys that can change a result."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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


def recipe_differences(recipes: Sequence[Mapping[str, Any]]) -> list[RecipeDifference]:
    """Return the keys whose values differ between resolved recipes (plain mappings), in the order of the recipes.

    A stage is known by its name. One that a recipe does not have is one row with its kind, not a row for each key.
    Files are told by their place below the folder that holds all files of their recipe, so that two copies of a project
    are alike.
    """
    flat = [_relative(dict(_flatten(recipe))) for recipe in recipes]
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
        if len(set(values)) > 1:
            found.append(RecipeDifference(key, values))
    return found


def _relative(values: dict[str, str]) -> dict[str, str]:
    """Return the values with absolute paths below the folder that all of them share."""
    paths = {key: value for key, value in values.items() if value.startswith("/")}
    if not paths:
        return values
    home = os.path.commonpath([os.path.dirname(path) for path in paths.values()])
    return values | {key: os.path.relpath(path, home) for key, path in paths.items()}


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
