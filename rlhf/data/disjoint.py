"""Comparison prompts are held out: no stage of the recipe has seen them."""

from __future__ import annotations

from rlhf.data.reading import read_conversations, read_prompts
from rlhf.errors import DataError
from rlhf.recipe.base import StageData
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import CompareStage, SftStage, Stage


def check_disjoint(recipe: Recipe) -> None:
    """Raise DataError when a stage trains or annotates on prompts that a later comparison judges on."""
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, CompareStage):
            held_out = {row.text for row in read_prompts(stage.prompts)}
            for earlier in recipe.stages[:index]:
                _check(earlier, held_out, stage.name)


def _check(stage: Stage, held_out: set[str], name: str) -> None:
    if shared := held_out & _seen(stage):
        raise DataError(
            f"{len(shared)} of {len(held_out)} prompts of stages.{name} are also in stages.{stage.name},"
            f" for example {min(shared)!r}; hold them out"
        )


def _seen(stage: Stage) -> set[str]:
    if isinstance(stage, SftStage):
        if isinstance(stage.data, StageData):
            return set()  # what the annotate stage saw
        return {message["content"] for row in read_conversations(stage.data) for message in row.messages[:1]}
    if isinstance(stage, CompareStage) or not hasattr(stage, "prompts"):
        return set()
    return {row.text for row in read_prompts(stage.prompts)}
