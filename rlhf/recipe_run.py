"""Runs a recipe: the run folder, the models it begins with, the stages, and the result."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from rlhf import backend
from rlhf.cache import default_cache
from rlhf.data.disjoint import check_disjoint
from rlhf.done_file import damaged, read_done
from rlhf.errors import DataError, RecipeError, ResourceError
from rlhf.interrupts import Interrupts
from rlhf.models.loading import resolve_model
from rlhf.progress import Display
from rlhf.pruning import sweep
from rlhf.recipe.dtype import Decision, decide
from rlhf.recipe.host_fit import check_caches, check_main_memory
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.plan import Known, check_lengths, headline, look_up, make_plan
from rlhf.recipe.resources import Resources, local_resources
from rlhf.recipe.schema import Recipe
from rlhf.recipe.seeds import expand_seeds
from rlhf.report.json import read_json
from rlhf.report.table import comparison_table, verdict
from rlhf.rewards.function import check_functions
from rlhf.rewards.http import check_tokens
from rlhf.roles import Launcher
from rlhf.run_folder import kept_dtype, locked, run_place, write_inputs
from rlhf.run_log import logged
from rlhf.run_record import recorded
from rlhf.sinks.base import open_sinks
from rlhf.stage_folder import StageFolder
from rlhf.stage_places import DONE, stage_folder
from rlhf.stage_run import Surroundings, check_stages, run_stages
from rlhf.terminal import Terminal

log = logging.getLogger("rlhf")


def run_recipe(
    loaded: LoadedRecipe,
    launch: Callable[[Recipe], Launcher],
    output: Path | None = None,
    console: Console | None = None,
    restart: Collection[str] = (),
) -> Path:
    """Run all stages that are not done yet and return the run folder; `launch` builds the roles' backend.

    An unfinished stage resumes from its last saved state, those named in `restart` begin from scratch. The folder's
    recipe is that of the last run that passed every check.

    Raises:
        Interrupted: a signal came; what was under way is saved.
    """
    if unknown := set(restart) - {stage.name for stage in expand_seeds(loaded.recipe).stages}:
        raise RecipeError(f"--restart {sorted(unknown)[0]}: the recipe has no such stage")
    folder = run_place(loaded.recipe, output)
    folder.mkdir(parents=True, exist_ok=True)
    console = console or Terminal()
    start = time.monotonic()
    with locked(folder), logged(folder), recorded(folder) as recorder:
        sweep(default_cache())
        ready = _prepared(loaded, folder, console, restart)
        with (
            Display(console) as display,
            Interrupts(display.say) as interrupts,
            open_sinks(ready.recipe, folder) as sinks,
            _started(ready.recipe, launch, display) as launcher,
        ):
            write_inputs(folder, ready.loaded)
            run = Surroundings(
                recipe=ready.recipe,
                folder=folder,
                models=ready.models,
                cpus=ready.cpus,
                launcher=launcher,
                display=display,
                interrupts=interrupts,
                sink=sinks,
                working_on=recorder.working_on,
                usual_length=ready.usual_length,
            )
            run_stages(run, ready.folders)
        _show_result(ready.recipe, folder, console)
    console.print(f"done in {time.monotonic() - start:.0f} s, run folder {folder}", markup=False, soft_wrap=True)
    return folder


@dataclass(frozen=True)
class Prepared:
    """A run that passed every check: its recipe with the dtype decided, and `recipe`, the same with seeds expanded.

    `models`, `cpus` and `usual_length` are as in `Surroundings`; `folders` are those of the stages.
    """

    loaded: LoadedRecipe
    recipe: Recipe
    models: Mapping[str, Path]
    cpus: float
    usual_length: int | None
    folders: Sequence[StageFolder]


def _prepared(loaded: LoadedRecipe, folder: Path, console: Console, restart: Collection[str]) -> Prepared:
    """Decide the dtype, print the plan's first line, and check models, data, rewards, folders and memory."""
    resources = local_resources()
    decision = decide(loaded.recipe, backend.devices(loaded.recipe, resources.gpus), kept_dtype(folder))
    loaded = replace(loaded, recipe=decision.recipe)
    recipe = expand_seeds(loaded.recipe)
    known = look_up(recipe)
    plan = make_plan(loaded, resources, known=known)
    console.print(headline(plan), markup=False, highlight=False, soft_wrap=True)
    _say(decision, console)
    check_lengths(recipe, known.shapes.base)
    models = _models(recipe)
    check_disjoint(loaded.recipe)
    check_tokens(loaded.recipe)
    check_functions(loaded.recipe)
    folders = check_stages(recipe, folder, models, restart)
    todo = [stage.name for stage, made in zip(recipe.stages, folders, strict=True) if not made.whole]
    check_room(recipe, known, resources, todo, console)
    return Prepared(loaded, recipe, models, resources.cpus, plan.usual_length, folders)


def _say(decision: Decision, console: Console) -> None:
    """Print how the dtype was decided and what it costs, and log it."""
    for text in (*decision.notes, *(f"warning: {text}" for text in decision.warnings)):
        log.info(text)
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _models(recipe: Recipe) -> dict[str, Path]:
    """Return the folders of the base model and of the recipe's checkpoints."""
    models = {"base": resolve_model(recipe.model)}
    for name, path in recipe.checkpoints.items():
        models[name] = resolve_model(recipe.model.model_copy(update={"path": path, "revision": None}))
    return models


def _started(recipe: Recipe, launch: Callable[[Recipe], Launcher], display: Display) -> Launcher:
    """Return what builds the roles, and say what starts where that takes a while."""
    if recipe.backend == "ray":
        where = f"joining Ray at {recipe.ray.address}" if recipe.ray.address else "starting Ray on this machine"
        display.wait(where)
    return launch(recipe)


def check_room(recipe: Recipe, known: Known, resources: Resources, todo: Collection[str], console: Console) -> None:
    """Raise ResourceError when a stage of `todo` wants more main memory than is free; a cluster's is not known here."""
    if recipe.ray.address is not None or resources.free_bytes is None or not todo:
        return
    check_caches(recipe, known.shapes, known.measured)
    try:
        check_main_memory(recipe, known.shapes, known.measured, resources.free_bytes, todo)
    except ResourceError as error:
        if recipe.on_low_memory == "stop":
            raise
        log.warning("%s", error)
        console.print(f"warning: {error}", markup=False, highlight=False, soft_wrap=True)


def _show_result(recipe: Recipe, folder: Path, console: Console) -> None:
    """Print every comparison and put the report of the last one at the top of the run folder."""
    for stage in recipe.stages:
        if stage.kind != "compare":
            continue
        source = stage_folder(folder, stage.name)
        try:
            for name in ("report.html", "report.json", "leaderboard.csv"):
                shutil.copyfile(source / name, folder / name)
            comparison = read_json(source / "report.json")
        except (FileNotFoundError, DataError) as error:  # of a stage whose version did not seal its report
            raise damaged(source, "its report is missing or changed", read_done(source / DONE)["key"]) from error
        console.print(comparison_table(comparison))
        console.print(verdict(comparison), markup=False, highlight=False)
        console.print(f"report: {source / 'report.html'}", markup=False, soft_wrap=True)
