"""The runs below a folder: how far each is, who won, and what their recipes do differently."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import DataError, RlhfError
from rlhf.report.json import read_json
from rlhf.report.recipes import recipe_differences
from rlhf.report.results import show
from rlhf.report.runs import read_recipe, recipe_folder
from rlhf.report.status import RunState, read_status
from rlhf.untrusted import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

RECIPE = "recipe.resolved.yaml"
MOST_BESIDE = 4
"""Runs whose values stand beside each other; more would be narrow columns."""


@dataclass(frozen=True)
class ListedRun:
    """A run folder; `result` has the gold reward of each method, best first, where the run ended in a comparison.

    `unreadable` says why a folder that looks like a run cannot be read; then the rest is empty.
    """

    folder: str
    recipe: str
    state: RunState
    began: float | None
    stages_done: int
    stages: int
    result: dict[str, float]
    unreadable: str = ""


@dataclass(frozen=True)
class Difference:
    """A key that runs of one recipe's name have different values of; `values` by run folder."""

    recipe: str
    key: str
    values: dict[str, str]


@dataclass(frozen=True)
class Listing:
    """All runs, oldest first, and where those of one recipe differ."""

    folder: str
    runs: tuple[ListedRun, ...]
    differences: tuple[Difference, ...]


def list_runs(folder: Path) -> Listing:
    """Read every run folder in a folder, or the folder itself where it is one; DataError where there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the one that holds the run folders")
    paths = [folder] if (folder / RECIPE).is_file() else [path.parent for path in sorted(folder.glob(f"*/{RECIPE}"))]
    if not paths:
        raise DataError(f"{folder}: no run folders in it (none has a {RECIPE})")
    listed = sorted((_listed(path) for path in paths), key=lambda run: (run.began or 0.0, run.folder))
    return Listing(str(folder), tuple(listed), tuple(_differences(listed)))


def _listed(folder: Path) -> ListedRun:
    try:
        status = read_status(folder)
        result = _result(folder)
    except (RlhfError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return ListedRun(str(folder), "", "new", None, 0, 0, {}, str(error).splitlines()[0])
    began = status.began or (folder / RECIPE).stat().st_mtime
    return ListedRun(str(folder), status.name, status.state, began, status.finished, len(status.stages), result)


def _result(folder: Path) -> dict[str, float]:
    path = folder / "report.json"
    return {item.name: item.gold for item in read_json(path).ranked} if path.is_file() else {}


def _differences(runs: Sequence[ListedRun]) -> Iterator[Difference]:
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if not run.unreadable:
            groups.setdefault(run.recipe, {})[run.folder] = read_recipe(Path(run.folder))
    for name, recipes in groups.items():
        folders = [recipe_folder(Path(folder)) for folder in recipes]
        for difference in recipe_differences(list(recipes.values()), folders):
            yield Difference(name, difference.key, dict(zip(recipes, difference.values, strict=True)))


def render_runs(listing: Listing) -> RenderableType:
    """Return the listing for a terminal: one row for each run, and one for each key that differs."""
    from rich import box
    from rich.console import Group
    from rich.text import Text

    from rlhf.tables import WholeTable

    table = WholeTable("run", "recipe", "began", "state", "stages", "gold reward", box=box.SIMPLE_HEAD, pad_edge=False)
    for run in listing.runs:
        when = "" if run.began is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(run.began))
        result = ", ".join(f"{name} {show(gold)}" for name, gold in run.result.items())
        state = "unreadable" if run.unreadable else run.state
        cells = (Path(run.folder).name, run.recipe, when, state, f"{run.stages_done}/{run.stages}")
        table.add_row(*(Text(visible(cell)) for cell in (*cells, run.unreadable or result)))
    parts: list[RenderableType] = [table]
    for name in dict.fromkeys(difference.recipe for difference in listing.differences):
        mine = [difference for difference in listing.differences if difference.recipe == name]
        parts += [Text(visible(f"what differs between the runs of {name}")), _differences_table(mine)]
    return Group(*parts)


def _differences_table(differences: Sequence[Difference]) -> RenderableType:
    """Return a row for each key and a column for each run or, of many runs, a row for each key and run."""
    from rich import box
    from rich.text import Text

    from rlhf.tables import WholeTable, told_apart

    names = [Path(folder).name for folder in differences[0].values]
    beside = len(names) <= MOST_BESIDE
    table = WholeTable("key", *([] if beside else ["run", "value"]), box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names if beside else []:
        table.add_column(Text(visible(name)))
    for difference in differences:
        values = told_apart([visible(value, None) for value in difference.values.values()])
        if beside:
            table.add_row(*map(Text, (visible(difference.key), *values)))
            continue
        for number, (name, value) in enumerate(zip(names, values, strict=True)):
            table.add_row(*map(Text, ("" if number else visible(difference.key), visible(name), value)))
    return table
