"""`seeds: [1, 2, 3]`: each method once per seed, from the same start and the same pairs."""

from __future__ import annotations

from rlhf.recipe.base import ModelJudge, StageData
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_base import MARK
from rlhf.recipe.stage_schema import CompareStage, Stage, upstream


def expand_seeds(recipe: Recipe) -> Recipe:
    """Return the recipe with every preference and online stage, and what follows from it, once per seed.

    Stage `ppo` becomes `ppo@1`, `ppo@2`, ...; a comparison is made once, of all of them. What comes before the first
    such stage (SFT, pairs, reward model) runs once under the recipe's `seed`. Without `seeds` nothing changes.
    """
    if not recipe.seeds:
        return recipe
    branched: set[str] = set()
    stages: list[Stage] = []
    for stage in recipe.stages:
        if isinstance(stage, CompareStage):
            stages.append(_compared(stage, branched, recipe.seeds))
        elif isinstance(stage, OnlineStage | PreferenceStage) or upstream(stage) & branched:
            branched.add(stage.name)
            stages += [_branch(stage, branched, seed) for seed in recipe.seeds]
        else:
            stages.append(stage)
    return recipe.model_copy(update={"stages": stages})


def method(name: str) -> str:
    """Return the stage that a run of it belongs to: `ppo@2` -> `ppo`."""
    return name.partition(MARK)[0]


def _branch(stage: Stage, branched: set[str], seed: int) -> Stage:
    """Return the stage under one seed, reading from the same seed's runs of the stages before it."""
    changes: dict[str, object] = {"name": f"{stage.name}{MARK}{seed}", "seed": seed}
    for field in ("init", "policy"):
        if getattr(stage, field, None) in branched:
            changes[field] = f"{getattr(stage, field)}{MARK}{seed}"
    for field in ("data", "reward", "judge"):
        section = getattr(stage, field, None)
        if isinstance(section, StageData | ModelJudge) and section.stage in branched:
            changes[field] = section.model_copy(update={"stage": f"{section.stage}{MARK}{seed}"})
    return stage.model_copy(update=changes)


def _compared(stage: CompareStage, branched: set[str], seeds: list[int]) -> CompareStage:
    names: list[str] = []
    for name in stage.candidates:
        names += [f"{name}{MARK}{seed}" for seed in seeds] if name in branched else [name]
    return stage.model_copy(update={"candidates": names})
