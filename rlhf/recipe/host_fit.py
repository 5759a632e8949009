"""Whether a run fits into main memory, and which change would make it fit."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from functools import partial

from rlhf.errors import ResourceError
from rlhf.recipe.fit import Shapes, with_role
from rlhf.recipe.phases import RoleMemory, stage_memory
from rlhf.recipe.process_memory import HostMemory, host_memory
from rlhf.recipe.role_schema import RoleName, TrainedRole
from rlhf.recipe.row_lengths import Measured, narrowed
from rlhf.recipe.schedule import pass_tokens
from rlhf.recipe.schema import Recipe

SHOWN = 3
FEWEST_TOKENS, FEWEST_SEQUENCES = 64, 8


def run_memory(recipe: Recipe, shapes: Shapes, measured: Measured) -> list[HostMemory]:
    """Return the fullest moment of each stage in main memory, with rows as long as the data's; GPUs are left out."""
    return host_memory(recipe, _roles(recipe, shapes, measured))


def check_caches(recipe: Recipe, shapes: Shapes, measured: Measured) -> None:
    """Raise ResourceError where the KV cache that a recipe gives an engine on the CPU holds no whole sequence."""
    for stage, roles in _roles(recipe, shapes, measured).items():
        for name, memory in roles.items():
            engine = memory.engine
            if engine and not getattr(recipe.roles, name).gpus and engine.room < engine.least:
                least = math.ceil(engine.least / 2**30 * 1000) / 1000
                raise ResourceError(
                    f"roles.{name}.kv_cache_gib: one sequence of full length takes {least:g} in stage {stage}; without "
                    "the key the cache is as large as the data wants"
                )


def _roles(recipe: Recipe, shapes: Shapes, measured: Measured) -> dict[str, dict[RoleName, RoleMemory]]:
    real = narrowed(recipe, measured)
    return {
        stage.name: stage_memory(recipe, stage, shapes.base, shapes.judges.get(stage.name), None, real)
        for stage in recipe.stages
    }


def check_main_memory(
    recipe: Recipe, shapes: Shapes, measured: Measured, room: int, todo: Collection[str] | None = None
) -> None:
    """Raise ResourceError where a stage of `todo` (None: any) is estimated to need more than `room` bytes."""
    fullest = _fullest(recipe, shapes, measured, todo)
    if fullest is None or fullest.total <= room:
        return
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in sorted(fullest.parts.items(), key=lambda part: -part[1]))
    helps = _remedy(recipe, shapes, measured, room, todo)
    raise ResourceError(
        f"stage {fullest.stage} is estimated to need {_gib(fullest.total)} GiB of main memory to {fullest.phase} "
        f"({parts}), and {_gib(room)} GiB are free; {helps}. `on_low_memory: warn` runs all the same"
    )


def _remedy(recipe: Recipe, shapes: Shapes, measured: Measured, room: int, todo: Collection[str] | None) -> str:
    """Return what makes the run fit: single changes, or one after another, each the one that helps most."""
    need = partial(_need, shapes=shapes, measured=measured, todo=todo)
    enough = [text for text, changed in _changes(recipe) if need(changed) <= room]
    if enough:
        return f"would help: {'; or '.join(enough[:SHOWN])}"
    steps: list[str] = []
    while need(recipe) > room and len(steps) < SHOWN:
        before = need(recipe)
        text, recipe = min(_changes(recipe), key=lambda change: need(change[1]), default=("", recipe))
        if need(recipe) >= before:
            break
        steps.append(text)
    if need(recipe) <= room:
        return f"would help: {' and '.join(steps)}"
    told = f" (even with {' and '.join(steps)})" if steps else ""
    return f"take a smaller model or a machine with more memory, or end other programs{told}"


def _changes(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    """Yield single changes of what results do not depend on, as the recipe writes them."""
    tokens = max(pass_tokens(recipe, stage) for stage in recipe.stages)
    for fewer in (tokens // 2, tokens // 4):
        if fewer >= FEWEST_TOKENS:
            stages = [stage.model_copy(update={"max_tokens_per_microbatch": fewer}) for stage in recipe.stages]
            text = f"max_tokens_per_microbatch: {fewer} in all stages"
            yield text, recipe.model_copy(update={"stages": stages})
    if recipe.roles.rollout.kv_cache_gib is not None:
        yield "no roles.rollout.kv_cache_gib", with_role(recipe, "rollout", kv_cache_gib=None)
    sequences = recipe.roles.rollout.max_sequences
    for fewer in (sequences // 2, sequences // 4) if recipe.roles.rollout.kv_cache_gib is None else ():
        if fewer >= FEWEST_SEQUENCES:
            yield f"roles.rollout.max_sequences: {fewer}", with_role(recipe, "rollout", max_sequences=fewer)
    trained: tuple[RoleName, ...] = ("policy", "critic", "reward")
    if not all(getattr(recipe.roles, name).gradient_checkpointing for name in trained):
        changed = recipe
        for name in trained:
            assert isinstance(getattr(recipe.roles, name), TrainedRole)
            changed = with_role(changed, name, gradient_checkpointing=True)
        yield "gradient_checkpointing: true in roles.policy, critic and reward", changed


def _need(recipe: Recipe, shapes: Shapes, measured: Measured, todo: Collection[str] | None) -> int:
    fullest = _fullest(recipe, shapes, measured, todo)
    return fullest.total if fullest else 0


def _fullest(recipe: Recipe, shapes: Shapes, measured: Measured, todo: Collection[str] | None) -> HostMemory | None:
    stages = [memory for memory in run_memory(recipe, shapes, measured) if todo is None or memory.stage in todo]
    return max(stages, key=lambda memory: memory.total, default=None)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
