"""`rlhf compare`: finished runs side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import DataError, RecipeError, RlhfError
from rlhf.recipe.source import parse
from rlhf.report.curves import Curve, read_curves
from rlhf.report.evaluation import merge, read_evaluation
from rlhf.report.html import write_html
from rlhf.report.json import write_json
from rlhf.report.results import Comparison
from rlhf.run_record import read_record

KEYS = ("name", "kind")
"""What every stage of a resolved recipe has."""


def compare_runs(folders: Sequence[Path], output: Path) -> Comparison:
    """Write the report of several run folders (HTML, and JSON beside it) and return the comparison.

    With one folder this is its own report again. Candidates and curves of several are named `run/stage`.
    Raises DataError when a folder has no finished comparison or the runs were not compared on an equal footing, and
    RecipeError when `output` cannot be written so or a folder is given twice.
    """
    if output.suffix == ".json" or not output.absolute().parent.is_dir():
        raise RecipeError(f"--output {output}: give an HTML file in a folder that exists; the JSON goes beside it")
    _check_distinct(folders)
    runs = _named(folders)
    evaluations = {name: read_evaluation(folder) for name, folder in runs.items()}
    first = next(iter(runs))
    evaluation = merge(evaluations) if len(runs) > 1 else evaluations[first]
    comparison = evaluation.compare()
    write_json(output.with_suffix(".json"), comparison)
    write_html(
        output,
        comparison,
        _curves(runs),
        evaluation.candidates,
        evaluation.facts,
        recipes={name: read_recipe(folder) for name, folder in runs.items()} if len(runs) > 1 else None,
        recipe_folders={name: recipe_folder(folder) for name, folder in runs.items()},
        environment=read_environment(runs[first]),
    )
    return comparison


def _check_distinct(folders: Sequence[Path]) -> None:
    """Raise RecipeError when two of the folders are one, by whatever way they are named."""
    seen: dict[Path, Path] = {}
    for folder in folders:
        same = seen.setdefault(folder.resolve(), folder)
        if same is not folder:
            also = "" if str(same) == str(folder) else f" (it is also {same})"
            raise RecipeError(f"{folder}: the same run folder is given twice{also}; name each run once")


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folders by name; those that are called alike get numbers."""
    runs: dict[str, Path] = {}
    for folder in folders:
        name, count = folder.absolute().name, 2
        while name in runs:
            name, count = f"{folder.absolute().name}-{count}", count + 1
        runs[name] = folder
    return runs


def _curves(runs: Mapping[str, Path]) -> dict[str, Curve]:
    if len(runs) == 1:
        return read_curves(next(iter(runs.values())))
    return {f"{name}/{stage}": curve for name, folder in runs.items() for stage, curve in read_curves(folder).items()}


def read_recipe(folder: Path) -> dict[str, Any]:
    """Return the resolved recipe of a run folder as plain values; DataError where there is none that can be read."""
    path = folder / "recipe.resolved.yaml"
    if not path.is_file():
        refused = (record := read_record(folder)) and record.error
        why = f"; its last run was refused: {refused.splitlines()[0]}" if refused else ""
        raise DataError(f"{path}: no such file; is {folder} a run folder?{why}")
    try:
        recipe = parse(path.read_text(encoding="utf-8"), path).plain()
        named = [recipe["name"], recipe["model"]["path"], *(stage[key] for stage in recipe["stages"] for key in KEYS)]
        if all(isinstance(value, str) for value in named):
            return dict(recipe)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RlhfError):
        pass
    raise DataError(f"{path} is damaged; `rlhf run` with the run's recipe writes it again")


def recipe_folder(folder: Path) -> Path | None:
    """Return the folder of the recipe file that a run folder was last run with; None where that is not recorded."""
    try:
        return Path(json.loads((folder / "environment.json").read_bytes())["recipe"]).parent
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read_environment(folder: Path) -> dict[str, str]:
    """Return the versions that a run folder was last run with, by name; DataError where they cannot be read."""
    path = folder / "environment.json"
    try:
        return versions(json.loads(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise DataError(f"{path} is missing or damaged; `rlhf run` with the run's recipe writes it again") from None


def versions(environment: Mapping[str, Any]) -> dict[str, str]:
    """Return the versions in what `rlhf.run_folder.environment` wrote, by name."""
    found = {"python": environment["python"], "platform": environment["platform"], **environment["packages"]}
    return {str(name): str(version) for name, version in found.items()}
