"""What the stages want of a machine or cluster, and whether it is there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from rlhf.errors import ResourceError
from rlhf.recipe.base import LlmJudge, ModelJudge
from rlhf.recipe.main_memory import main_memory
from rlhf.recipe.online_schema import OnlineStage, PpoStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.role_schema import RoleName, RolloutRole
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import (
    AnnotateStage,
    ClassifyStage,
    CompareStage,
    RewardStage,
    SftStage,
    Stage,
    SynthesizeStage,
)
from rlhf.recipe.tuning_support import support


@dataclass(frozen=True)
class Resources:
    """What there is: CPU cores, accelerators, main memory, and how much of it is free, where that is known."""

    cpus: float
    gpus: float
    memory_bytes: int
    free_bytes: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What a role asks for: `gpus` and `cpus` of each of its `count` processes; `shares` names whose GPUs they are."""

    gpus: float
    cpus: float
    count: int
    shares: RoleName | None = None


def local_resources() -> Resources:
    """Return what this process may use on this machine."""
    memory = main_memory()
    return Resources(len(os.sched_getaffinity(0)), visible_gpus(), memory.usable, memory.free)


def visible_gpus() -> int:
    """Return how many GPUs this process may use."""
    import torch

    return torch.cuda.device_count()


def wanted(recipe: Recipe, stage: Stage) -> dict[RoleName, Wanted]:
    """Return the roles that a stage uses; each replica of an engine is one process.

    dpo needs no reference: its logprobs are computed by the policy before the first step. compare scores one
    candidate after the other, and the baseline, in the policy's process.
    """
    found: dict[RoleName, Wanted] = {}
    for name in _roles(recipe, stage):
        role = getattr(recipe.roles, name)
        shares = getattr(role, "share", None)
        found[name] = Wanted(getattr(recipe.roles, shares or name).gpus, role.cpus, process_count(recipe, name), shares)
    return found


def on_gpu(recipe: Recipe, role: Wanted, visible: bool) -> bool:
    """Return whether a role computes on a GPU: it asks for one, or it is in this process, which sees some."""
    return role.gpus > 0 or (recipe.backend == "local" and visible)


def accelerators(recipe: Recipe, stage: Stage) -> float:
    """Return the GPUs that a stage's roles hold, shared ones once."""
    owners = {role.shares or name: role for name, role in wanted(recipe, stage).items()}
    counts = {name: process_count(recipe, name) for name in owners}
    return sum(owners[name].gpus * counts[name] for name in owners)


def process_count(recipe: Recipe, name: RoleName) -> int:
    """Return the processes of a role."""
    role = getattr(recipe.roles, name)
    return role.replicas if isinstance(role, RolloutRole) else role.ranks


def reference_in_policy(recipe: Recipe, stage: OnlineStage) -> bool:
    """Return whether the reference needs no weights of its own: the policy's adapters are switched off instead."""
    return recipe.roles.reference.share == "policy" and support(stage.tuning or recipe.tuning).reference


def _roles(recipe: Recipe, stage: Stage) -> tuple[RoleName, ...]:
    match stage:
        case SftStage() | ClassifyStage() | PreferenceStage():
            return ("policy",)
        case RewardStage():
            return ("reward",)
        case AnnotateStage():
            return (*_reward(stage.judge), "rollout")
        case SynthesizeStage():
            return ("rollout",)
        case OnlineStage():
            reference: tuple[RoleName, ...] = () if reference_in_policy(recipe, stage) else ("reference",)
            critic: tuple[RoleName, ...] = ("critic",) if isinstance(stage, PpoStage) else ()
            return ("policy", *reference, *_reward(stage.reward), *critic, "rollout")
        case CompareStage():
            return ("policy", *_reward(stage.gold, stage.reward), "rollout")


def _reward(*judges: object) -> tuple[RoleName, ...]:
    model: tuple[RoleName, ...] = ("reward",) if any(isinstance(judge, ModelJudge) for judge in judges) else ()
    runs_here = any(isinstance(judge, LlmJudge) and judge.url is None for judge in judges)
    return (*model, "judge") if runs_here else model


def threads(recipe: Recipe, stage: Stage, cores: int) -> dict[RoleName, int]:
    """Return the CPU threads of each process of a role in a stage.

    In one process (`backend: local`) the roles work one after another, each with all cores. On a cluster that is
    joined they are the CPUs that the process reserves. On one's own machine processes busy at the same time must not
    want more threads than there are cores, since spinning OpenMP barriers then cost a factor of ten: while an engine
    generates nothing else runs; in online stages all other models of the stage score side by side, and policy and
    critic train so.
    """
    alone = ("rollout", "judge")
    roles = wanted(recipe, stage)
    if recipe.backend == "local":
        return dict.fromkeys(roles, max(1, cores))
    if recipe.ray.address is not None:
        return {name: max(1, int(role.cpus)) for name, role in roles.items()}
    learning = [role.count for name, role in roles.items() if name not in alone]
    busy = max(learning, default=1)
    if isinstance(stage, OnlineStage) and len(learning) > 1:
        busy = max(2, *learning, sum(roles[name].count for name in ("policy", "critic") if name in roles))
    shared = max(1, cores // busy)
    return {name: max(1, cores // role.count) if name in alone else shared for name, role in roles.items()}


def processes(recipe: Recipe) -> dict[RoleName, Wanted]:
    """Return the roles of the whole run: a process starts once and stays for all stages that use its role."""
    used = {name: role for stage in recipe.stages for name, role in wanted(recipe, stage).items()}
    return {name: used[name] for name in get_args(RoleName) if name in used}


def check_fits(recipe: Recipe, resources: Resources) -> None:
    """Raise ResourceError when the roles of the run want more than there is.

    On one's own machine CPUs are logical slots and not counted. With backend `local` roles take turns in one
    process, so the largest role counts and not the sum.
    """
    roles = processes(recipe)
    gpus = {name: role.gpus * role.count for name, role in roles.items() if role.gpus and not role.shares}
    total = sum(gpus.values()) if recipe.backend == "ray" else max(gpus.values(), default=0)
    _compare(recipe, "gpus", gpus, total, resources.gpus)
    if recipe.backend == "ray" and recipe.ray.address is not None:
        cpus = {name: role.cpus * role.count for name, role in roles.items() if role.cpus}
        _compare(recipe, "cpus", cpus, sum(cpus.values()), resources.cpus)


def _compare(recipe: Recipe, unit: str, parts: Mapping[RoleName, float], total: float, available: float) -> None:
    if total <= available:
        return
    listed = []
    for name, amount in parts.items():
        stages = [stage.name for stage in recipe.stages if name in wanted(recipe, stage)]
        listed.append(f"{name} {amount:g} (for {', '.join(stages)})")
    raise ResourceError(
        f"the recipe wants {total:g} {unit}: {', '.join(listed)}; {available:g} available. "
        f"Lower roles.*.{unit}, share roles, or use a larger machine or cluster"
    )
