"""Whether every GPU holds what stands on it, in every phase of every stage, and which change would help most."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.recipe.check_roles import check_roles
from rlhf.recipe.check_tuning import check_tuning
from rlhf.recipe.devices import Device
from rlhf.recipe.engine_memory import EngineMemory
from rlhf.recipe.messages import Finding
from rlhf.recipe.model_shape import ModelShape
from rlhf.recipe.phases import Phase, RoleMemory, stage_memory, stage_phases
from rlhf.recipe.placement import place
from rlhf.recipe.resources import wanted
from rlhf.recipe.role_schema import RoleName, RolloutRole, TrainedRole
from rlhf.recipe.schedule import pass_tokens
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import Stage

REMEDIES = 3


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a GPU: where, when, by whom (bytes of each process), and how much there may be."""

    stage: str
    phase: Phase
    parts: dict[RoleName, int]
    limit: int

    @property
    def total(self) -> int:
        """Bytes of all processes."""
        return sum(self.parts.values())

    @property
    def over(self) -> int:
        """Bytes beyond the limit; negative where there is room."""
        return self.total - self.limit


@dataclass(frozen=True)
class Fit:
    """The fullest moment of the run, what does not fit, in words, and the roles whose own GPUs are too small."""

    peak: Peak | None
    problems: tuple[str, ...]
    crowded: tuple[RoleName, ...] = ()


@dataclass(frozen=True)
class Shapes:
    """The recipe's model, and by stage the model of a judge that runs here."""

    base: ModelShape
    judges: dict[str, ModelShape]


def check_memory(recipe: Recipe, shapes: Shapes, device: Device) -> Fit:
    """Compare every GPU of the run with the device, in every phase of every stage.

    Processes on the same GPU add up; a role with a fraction of a GPU has that fraction of its memory.
    """
    peaks, problems = [], []
    crowded: set[RoleName] = set()
    for stage in recipe.stages:
        roles = stage_memory(recipe, stage, shapes.base, shapes.judges.get(stage.name), device)
        found = list(_peaks(recipe, stage, roles, device))
        fullest = max((peak for _, peak in found), key=lambda peak: peak.over, default=None)
        if fullest:
            peaks.append(fullest)
        problems += [_too_full(fullest, device)] if fullest and fullest.over > 0 else []
        cramped = {name: role.engine for name, role in roles.items() if role.engine and _cramped(role.engine)}
        problems += [
            f"stage {stage.name}: {name} has {_gib(max(0, engine.room))} GiB for its KV cache on a {device.name}, and "
            f"one sequence of full length takes {_gib(engine.least)}"
            for name, engine in cramped.items()
        ]
        crowded |= {host for host, peak in found if peak.over > 0}
        crowded |= {wanted(recipe, stage)[name].shares or name for name in cramped}
    return Fit(max(peaks, key=lambda peak: peak.over, default=None), tuple(problems), tuple(sorted(crowded)))


def remedies(recipe: Recipe, shapes: Shapes, device: Device) -> tuple[str, ...]:
    """Return changes of a recipe that does not fit, as written there: each alone suffices, the least costly first.

    Where none does, they are one change after another, each the one that then helps most, in one text.
    """
    found = _ranked(recipe, shapes, device)
    enough = [text for text, _, fits in found if fits]
    if enough or not found:
        return tuple(enough[:REMEDIES])
    steps: list[str] = []
    changed, fits = recipe, False
    while found and not fits and len(steps) < REMEDIES:
        text, changed, fits = found[0]
        steps.append(text)
        found = _ranked(changed, shapes, device)
    return (" and ".join(steps) + ("" if fits else " (not enough yet)"),)


def _ranked(recipe: Recipe, shapes: Shapes, device: Device) -> list[tuple[str, Recipe, bool]]:
    """Return single changes that help, and whether they suffice: those first, then by the bytes they save."""
    now = check_memory(recipe, shapes, device)
    ranked = []
    for order, (text, changed) in enumerate(_changes(recipe, now)):
        if _findings(changed) != _findings(recipe):
            continue
        then = check_memory(changed, shapes, device)
        saved = (now.peak.over if now.peak else 0) - (then.peak.over if then.peak else 0)
        if not then.problems:
            ranked.append((0, order, text, changed))
        elif saved > 0:
            ranked.append((1, -saved, text, changed))
    found = sorted(ranked, key=lambda change: change[:2])
    return [(text, changed, not late) for late, _, text, changed in found]


def _findings(recipe: Recipe) -> list[Finding]:
    return [*check_roles(recipe), *check_tuning(recipe, {})]


def with_role(recipe: Recipe, name: RoleName, **keys: object) -> Recipe:
    """Return the recipe with other keys of one role."""
    role = getattr(recipe.roles, name).model_copy(update=keys)
    return recipe.model_copy(update={"roles": recipe.roles.model_copy(update={name: role})})


def _peaks(
    recipe: Recipe, stage: Stage, roles: dict[RoleName, RoleMemory], device: Device
) -> Iterator[tuple[RoleName, Peak]]:
    seen = set()
    for bundle in place(recipe):
        for members in bundle.devices():
            host = members[0]
            here = tuple(sorted(process.role for process in members if process.role in roles))
            if not host.gpus or not here or here in seen:
                continue
            seen.add(here)
            limit = int(min(1, host.gpus) * device.memory)
            for phase in stage_phases(stage):
                yield (
                    host.role,
                    Peak(stage.name, phase, {name: roles[name].phases[phase].total for name in here}, limit),
                )


def _cramped(engine: EngineMemory) -> bool:
    """Return whether an engine on a GPU has no room for a single sequence."""
    return engine.awake.buffers > 0 and engine.room < engine.least


def _too_full(peak: Peak, device: Device) -> str:
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in sorted(peak.parts.items(), key=lambda part: -part[1]))
    return (
        f"stage {peak.stage} needs {_gib(peak.total)} GiB on one GPU to {peak.phase} ({parts}), "
        f"a {device.name} has {_gib(peak.limit)}"
    )


def _changes(recipe: Recipe, now: Fit) -> Iterator[tuple[str, Recipe]]:
    """Yield single changes to the roles and the stage at the fullest moment, the least costly first."""
    names: list[RoleName] = list(now.peak.parts) if now.peak else ["rollout"]
    for name in names:
        role = getattr(recipe.roles, name)
        if isinstance(role, RolloutRole):
            for share in (0.6, 0.5, 0.4, 0.3):
                if share < role.gpu_memory_utilization and role.share:
                    yield (
                        f"roles.{name}.gpu_memory_utilization: {share}",
                        with_role(recipe, name, gpu_memory_utilization=share),
                    )
            for wide in (2, 4, 8):
                if wide > role.tensor_parallel and not role.share:
                    text = f"roles.{name}.tensor_parallel: {wide} (gpus: {wide})"
                    yield text, with_role(recipe, name, tensor_parallel=wide, gpus=wide)
            continue
        if isinstance(role, TrainedRole) and not role.gradient_checkpointing:
            yield f"roles.{name}.gradient_checkpointing: true", with_role(recipe, name, gradient_checkpointing=True)
        if role.zero_stage < 3 and role.ranks > 1:
            yield f"roles.{name}.zero_stage: 3", with_role(recipe, name, zero_stage=3)
    yield from _smaller_passes(recipe, now)
    for name in names:
        role = getattr(recipe.roles, name)
        if isinstance(role, RolloutRole):
            continue
        if isinstance(role, TrainedRole) and role.offload == "none":
            yield f"roles.{name}.offload: optimizer", with_role(recipe, name, offload="optimizer")
        for ranks in (2, 4, 8, 16):
            if ranks > role.ranks and not getattr(role, "share", None):
                yield f"roles.{name}.ranks: {ranks}", with_role(recipe, name, ranks=ranks)
                text = f"roles.{name}.ranks: {ranks} with zero_stage: 3"
                yield text, with_role(recipe, name, ranks=ranks, zero_stage=3)


def _smaller_passes(recipe: Recipe, now: Fit) -> Iterator[tuple[str, Recipe]]:
    for index, stage in enumerate(recipe.stages):
        if now.peak and stage.name == now.peak.stage:
            for part in (2, 4):
                tokens = max(1, pass_tokens(recipe, stage) // part)
                smaller = stage.model_copy(update={"max_tokens_per_microbatch": tokens})
                stages = [*recipe.stages[:index], smaller, *recipe.stages[index + 1 :]]
                text = f"stages.{stage.name}.max_tokens_per_microbatch: {tokens}"
                yield text, recipe.model_copy(update={"stages": stages})


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
