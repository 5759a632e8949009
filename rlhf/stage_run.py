"""Runs the stages of a recipe: finished ones are reused, interrupted ones resume, failed ones are retried."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import disk
from rlhf.algorithms.preference import PAIR_LOSSES
from rlhf.errors import GuardError, LateProcess, LostProcess, RlhfError, TrainingError
from rlhf.fingerprint import folder_digest, stage_content
from rlhf.interrupts import Interrupted, Interrupts
from rlhf.progress import Display
from rlhf.recipe.resources import accelerators, threads
from rlhf.recipe.schedule import longest
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import Stage
from rlhf.report.curves import Curve
from rlhf.report.diagnosis import diagnose_curve, diagnose_end
from rlhf.roles import Launcher
from rlhf.run_folder import environment
from rlhf.sinks.base import Sink
from rlhf.stage_folder import StageFolder
from rlhf.stage_places import STATES, stage_folder
from rlhf.stages import annotate, classify, compare, kto, online, preference, reward, sft, synthesize
from rlhf.stages.context import StageContext
from rlhf.stages.recovery import StageRecovery
from rlhf.stages.sft import Summary
from rlhf.tracking import Tracker

log = logging.getLogger("rlhf")
GROWTH = 1.05
STAGES: dict[str, Callable[[Any, StageContext], Summary]] = {
    "sft": sft.run,
    "classify": classify.run,
    "annotate": annotate.run,
    "synthesize": synthesize.run,
    "reward": reward.run,
    "compare": compare.run,
    **dict.fromkeys(PAIR_LOSSES, preference.run),
    "kto": kto.run,
    **dict.fromkeys(("ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "online_dpo"), online.run),
}


@dataclass(frozen=True)
class Surroundings:
    """What all stages of a run share.

    `models` maps `base` and the recipe's checkpoints to their folders; `usual_length` is as in
    `StageContext`; `working_on` is called with the name of each stage that a process begins to work on.
    """

    recipe: Recipe
    folder: Path
    models: Mapping[str, Path]
    cpus: float
    launcher: Launcher
    display: Display
    interrupts: Interrupts
    sink: Sink | None
    working_on: Callable[[str], None]
    usual_length: int | None = None


def check_stages(
    recipe: Recipe, folder: Path, models: Mapping[str, Path], restart: Collection[str] = ()
) -> list[StageFolder]:
    """Return the folders of the recipe's stages in their order, each with what is there of it; nothing is begun.

    Those of `restart` begin from scratch. Raises RecipeError for a stage that was interrupted with other settings, and
    DataError for a finished one whose files are damaged.
    """
    keys = {name: folder_digest(model) for name, model in models.items()}
    found = []
    for stage in recipe.stages:
        content = stage_content(stage, recipe, keys)
        lean = stage_content(stage, recipe, keys, exclude_defaults=True)
        made = StageFolder(stage_folder(folder, stage.name), content, lean, stage.name in restart)
        made.check()
        keys[stage.name] = made.key
        found.append(made)
    return found


def run_stages(run: Surroundings, folders: Collection[StageFolder]) -> None:
    """Run the stages that are not done; `folders` are those of `check_stages`."""
    outputs = dict(run.models)
    for number, (stage, made) in enumerate(zip(run.recipe.stages, folders, strict=True), start=1):
        outputs[stage.name] = made.folder
        label = f"[{number}/{len(run.recipe.stages)}] {stage.name}"
        if made.whole:
            made.reuse(run.recipe.recovery.keep_old, run.display.say)
            run.display.say(f"{label}: unchanged, reused")
            continue
        run.working_on(stage.name)
        run.display.wait(f"{label}: loading models and data")
        made.prepare()
        began = time.monotonic()
        summary = _until_done(run, stage, made, outputs)
        run.display.say(f"{label}: done in {time.monotonic() - began:.0f} s  {_brief(summary)}")


def _until_done(run: Surroundings, stage: Stage, made: StageFolder, outputs: Mapping[str, Path]) -> Summary:
    """Run a stage; when a process that holds its state is lost, go on from the last saved one with new processes."""
    restarts, allowed = 0, run.recipe.recovery.restarts
    late_at: tuple[str, int] | None = None
    while True:
        context = _context(run, stage, made, outputs)
        try:
            summary = _attempt(stage, context)
        except LostProcess as error:
            before = late_at
            late_at = (error.call, context.tracker.step) if isinstance(error, LateProcess) else None
            if late_at and late_at == before:
                raise error.second() from error
            if restarts == allowed:
                raise
            restarts += 1
            log.warning("%s; goes on with new processes (%d of %d)", error, restarts, allowed)
            run.launcher.recover()
            continue
        run.launcher.release()
        context.tracker.flush()
        made.finish(summary, context.cost(), _origin(run.recipe), run.recipe.recovery.keep_old, run.display.say)
        for diagnosis in diagnose_end(context.tracker.curve):
            log.warning("%s: %s", stage.name, diagnosis)
        return summary


def _origin(recipe: Recipe) -> dict[str, Any]:
    """Return what a stage is made from beside its own content: the models that the run began with, and the software."""
    model = recipe.model.model_dump(mode="json")
    return {"model": model, "checkpoints": dict(recipe.checkpoints), "environment": environment()}


def _context(run: Surroundings, stage: Stage, made: StageFolder, outputs: Mapping[str, Path]) -> StageContext:
    place = made.place
    tracker = Tracker(stage.name, place, run.display, run.sink, watcher(stage, run.recipe))
    return StageContext(
        recipe=run.recipe,
        stage=stage,
        folder=place,
        outputs=outputs,
        launcher=run.launcher,
        tracker=tracker,
        threads=threads(run.recipe, stage, int(run.cpus)),
        max_length=longest(run.recipe),
        devices=accelerators(run.recipe, stage) or run.cpus,
        usual_length=run.usual_length,
        recovery=StageRecovery(place / STATES, made.key, made.content, run.recipe.recovery, tracker, run.interrupts),
    )


def _attempt(stage: Stage, context: StageContext) -> Summary:
    try:
        return STAGES[stage.kind](stage, context)
    except Interrupted as stop:
        raise Interrupted(stop.number, f"stage {stage.name}{f', {stop}' if str(stop) else ''}") from None
    except RlhfError as error:
        log.info("stage %s", stage.name, exc_info=True)
        at = f"stage {stage.name}" + (f", after step {context.tracker.step}" if context.tracker.step else "")
        raise error.within(at) from error
    except Exception as error:
        log.exception("stage %s", stage.name)
        if code := disk.refusal(error):
            raise disk.told(error, code, context.folder, f"stage {stage.name} cannot write") from error
        raise TrainingError(f"stage {stage.name}: {type(error).__name__}: {error}; see logs/run.log") from error


def watcher(stage: Stage, recipe: Recipe) -> Callable[[Curve], None]:
    """Return what says each diagnosis of the stage's curve once, or stops the run where the recipe wants that.

    A curve is read again when it has grown by a twentieth, so that the cost of long runs grows with their length, and
    after each evaluation.
    """
    said: set[str] = set()
    due = 0.0

    def watch(curve: Curve) -> None:
        nonlocal due
        if len(curve) < due and "heldout_loss" not in curve[-1]:
            return
        due = GROWTH * len(curve)
        for diagnosis in diagnose_curve(stage.kind, curve):
            if diagnosis.severity == "stop" and recipe.on_diagnosis == "stop":
                raise GuardError(str(diagnosis))
            if diagnosis.name not in said:
                said.add(diagnosis.name)
                log.warning("%s: %s", stage.name, diagnosis)

    return watch


def _brief(summary: Summary) -> str:
    shown = {name: f"{value:.3g}" if isinstance(value, float) else value for name, value in summary.items()}
    return "  ".join(f"{name} {value}" for name, value in shown.items())
