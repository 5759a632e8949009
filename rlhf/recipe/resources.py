"""What the stages want of a machine or cluster, and whether it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from rlhf.errors import ResourceError
from rlhf.recipe.base import Lora, ModelJudge
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import AnnotateStage, CompareStage, DpoStage, PpoStage, RewardStage, SftStage, Stage

RoleName = Literal["policy", "reference", "reward", "critic", "rollout"]


@dataclass(frozen=True)
class Resources:
    """What there is: CPU cores, accelerators and main memory."""

    cpus: float
    gpus: float
    memory_bytes: int


class Wanted(NamedTuple):
    """What a role asks for: `gpus` and `cpus` of each of its `count` processes."""

    gpus: float
    cpus: float
    count: int


def local_resources() -> Resources:
    """Return what this process may use on this machine."""
    import psutil
    import torch

    return Resources(len(os.sched_getaffinity(0)), torch.cuda.device_count(), psutil.virtual_memory().total)


def adapters(recipe: Recipe, chosen: Lora | Literal["full"] | None) -> Lora | None:
    """Return the adapters a model trains, with the stage's choice before the recipe's; None trains every weight."""
    setting = chosen or recipe.lora
    return None if setting == "full" else setting


def wanted(recipe: Recipe, stage: Stage) -> dict[RoleName, Wanted]:
    """Return the roles that a stage starts. A rollout replica takes `gpus` for each tensor-parallel rank."""
    found: dict[RoleName, Wanted] = {}
    for name in _roles(recipe, stage):
        role = getattr(recipe.roles, name)
        found[name] = Wanted(role.gpus, role.cpus, 1)
        if name == "rollout":
            found[name] = Wanted(role.gpus * role.tensor_parallel, role.cpus, role.replicas)
    return found


def _roles(recipe: Recipe, stage: Stage) -> tuple[RoleName, ...]:
    separate = recipe.roles.reference.share is None
    reference: tuple[RoleName, ...] = ("reference",)
    match stage:
        case SftStage():
            return ("policy",)
        case RewardStage():
            return ("reward",)
        case AnnotateStage():
            return (*_reward(stage.judge), "rollout")
        case PpoStage():
            return ("policy", *(reference if separate else ()), *_reward(stage.reward), "critic", "rollout")
        case DpoStage():
            own_base = adapters(recipe, stage.lora) is not None
            return ("policy", *(reference if separate and not own_base else ()))
        case CompareStage():
            return ("policy", "reference", *_reward(stage.gold, stage.reward), "rollout")


def _reward(*judges: object) -> tuple[RoleName, ...]:
    return ("reward",) if any(isinstance(judge, ModelJudge) for judge in judges) else ()


def threads(recipe: Recipe, stage: Stage, cores: int) -> dict[RoleName, int]:
    """Return the CPU threads of each role of a stage.

    Processes busy at the same time must not want more threads than there are cores, since spinning OpenMP
    barriers then cost a factor of ten. While an engine generates nothing else runs; in ppo the policy and the
    critic train side by side, in compare two models score side by side.
    """
    half = max(1, cores // 2)
    together = isinstance(stage, PpoStage | CompareStage)
    return {name: half if together and name != "rollout" else max(1, cores) for name in wanted(recipe, stage)}


def check_fits(recipe: Recipe, resources: Resources) -> None:
    """Raise ResourceError for the first stage that wants more than there is.

    On one's own machine CPUs are logical slots and not counted; with backend `local` roles take turns in one
    process, so the largest counts and not the sum.
    """
    for stage in recipe.stages:
        roles = wanted(recipe, stage)
        gpus = {name: role.gpus * role.count for name, role in roles.items() if role.gpus}
        total = sum(gpus.values()) if recipe.backend == "ray" else max(gpus.values(), default=0)
        _compare(stage, "GPUs", gpus, total, resources.gpus)
        if recipe.backend == "ray" and recipe.ray.address is not None:
            cpus = {name: role.cpus * role.count for name, role in roles.items() if role.cpus}
            _compare(stage, "CPUs", cpus, sum(cpus.values()), resources.cpus)


def _compare(stage: Stage, unit: str, parts: Mapping[RoleName, float], total: float, available: float) -> None:
    if total <= available:
        return
    listed = ", ".join(f"{name} {amount:g}" for name, amount in parts.items())
    raise ResourceError(
        f"stage {stage.name!r} wants {total:g} {unit} ({listed}), {available:g} available; "
        f"lower roles.*.{unit[:-1].lower()}s in the recipe or use a larger cluster"
    )
