"""The Python API: a recipe, a run of it, and what the run has left. Use it as `from rlhf import Recipe, run`."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlhf.command import quiet_libraries
from rlhf.done_file import read_done
from rlhf.errors import DataError, RecipeError
from rlhf.recipe import schema
from rlhf.recipe.load import LoadedRecipe, load_recipe, resolved_yaml
from rlhf.report.status import RunStatus, present_place, read_status
from rlhf.run_record import read_record
from rlhf.stage_places import DONE
from rlhf.terminal import Terminal

if TYPE_CHECKING:
    import pandas as pd  # type: ignore[import-untyped]

    from rlhf.report.results import Comparison

__all__ = ["Recipe", "Run", "StageResult", "run"]


@dataclass(frozen=True)
class Recipe:
    """A valid recipe; `settings` has every key of it, defaults included."""

    loaded: LoadedRecipe

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Read a recipe and check it as `rlhf validate` does.

        `overrides` are keys and values as of `--set`: `{"stages.ppo.steps": 4}`; stages go by name. Raises RecipeError
        with one line for each problem.
        """
        texts = [f"{key}={json.dumps(value)}" for key, value in (overrides or {}).items()]
        return cls(load_recipe(Path(path), texts))

    @property
    def settings(self) -> schema.Recipe:
        """Every key, with its type."""
        return self.loaded.recipe

    def __str__(self) -> str:
        """Return the recipe as YAML, every default written out."""
        return resolved_yaml(self.settings)


def run(
    recipe: Recipe,
    local: bool = False,
    output: str | Path | None = None,
    restart: Collection[str] = (),
    quiet: bool = False,
) -> Run:
    """Run a recipe as `rlhf run` does, and return what it left.

    Stages that are done and unchanged are reused, an interrupted one resumes; those named in `restart` begin from
    scratch. `local` keeps every role in this process, `output` is the run folder, `quiet` prints nothing.

    This process is yours: nothing here ends it. Where Ray's head is lost a ResourceError says so. Should this thread
    not come back from one of Ray's own calls within half a minute then, Ray ends the process, as it does without its
    head; `rlhf run` as a process of its own is safe from that.

    Raises:
        RlhfError: with a message for people; what is done is kept.
    """
    quiet_libraries()
    from rlhf.backend import launcher
    from rlhf.recipe_run import run_recipe

    loaded = recipe.loaded
    if local:
        loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"backend": "local"}))
    console = Terminal(quiet=True) if quiet else None
    try:
        folder = run_recipe(loaded, launcher(loaded.recipe), Path(output) if output else None, console, restart)
    except RecipeError as error:
        raise RecipeError(loaded.located(str(error))) from error
    return Run(folder)


class Run:
    """A run folder, made by `run` or `rlhf run`; it is read when asked, so a run that goes on can be watched."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "recipe.resolved.yaml").is_file():
            raise DataError(f"{folder}: no run folder (it has no recipe.resolved.yaml)")

    @property
    def status(self) -> RunStatus:
        """How far it is, as of `rlhf status`."""
        return read_status(self.folder)

    @property
    def stages(self) -> Stages:
        """The stages by name, in order."""
        return Stages(self.folder, [stage.name for stage in self.status.stages])

    @property
    def comparison(self) -> Comparison | None:
        """The result of the last comparison; None where there is none yet."""
        from rlhf.report.json import read_json

        path = self.folder / "report.json"
        return read_json(path) if path.is_file() else None

    @property
    def report(self) -> Path | None:
        """The HTML report; None where there is none yet."""
        path = self.folder / "report.html"
        return path if path.is_file() else None

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


class Stages(Mapping[str, "StageResult"]):
    """What each stage has left, by name."""

    def __init__(self, run: Path, names: list[str]) -> None:
        self.run = run
        self.names = names

    def __getitem__(self, name: str) -> StageResult:
        if name not in self.names:
            raise KeyError(f"{name}: the run has {', '.join(self.names)}")
        return StageResult(present_place(self.run, name, read_record(self.run)))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class StageResult:
    """The files of one stage; while a changed stage is made again, those of its successor."""

    folder: Path

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return (self.folder / DONE).is_file()

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One dictionary for each recorded step, in order; empty where the stage records none."""
        from rlhf.report.curves import read_curve

        path = self.folder / "metrics.jsonl"
        return read_curve(path) if path.is_file() else []

    def frame(self) -> pd.DataFrame:
        """Return the metrics as a pandas table, one row for each step."""
        import pandas as pd

        return pd.DataFrame(self.metrics)

    @property
    def summary(self) -> dict[str, Any]:
        """What the stage says of its result: counts, accuracy on held-out rows and the like; empty until it is done."""
        summary: dict[str, Any] = read_done(self.folder / DONE)["summary"] if self.done else {}
        return summary

    @property
    def model(self) -> Path | None:
        """The Hugging Face folder of the trained model, adapters merged; None where the stage leaves none."""
        return self._folder("model")

    @property
    def adapter(self) -> Path | None:
        """The PEFT folder of the adapters alone; None where the stage leaves none."""
        return self._folder("adapter")

    def _folder(self, name: str) -> Path | None:
        return self.folder / name if self.done and (self.folder / name).is_dir() else None
