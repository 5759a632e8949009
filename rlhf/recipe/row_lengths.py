"""How long the rows of a recipe's data really are, and the recipe with its limits lowered to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.recipe.base import StageData
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_base import Training
from rlhf.recipe.stage_schema import AnnotateStage, CompareStage, Stage


@dataclass(frozen=True)
class RowLengths:
    """Tokens of the rows of one source, as the chat template renders them.

    mean      of a row through the model: a prompt that both sides of a pair share counts once
    longest   of one sequence: a prompt, a chat, or a prompt with one of its answers
    complete  whether every row was measured; if not, longer ones may follow
    """

    mean: float
    longest: int
    complete: bool


Measured = Mapping[str, RowLengths]
"""By the key of the recipe that names the source: `stages.sft.data`."""


def narrowed(recipe: Recipe, measured: Measured) -> Recipe:
    """Return the recipe with `max_length` and `max_prompt_tokens` as long as the longest row of the stage's data.

    What was not measured whole keeps its limit. Training on the pairs of an `annotate` stage takes its prompts and
    responses.
    """
    stages: dict[str, Stage] = {}
    for stage in recipe.stages:
        stages[stage.name] = _narrowed(stage, stages, measured)
    return recipe.model_copy(update={"stages": list(stages.values())})


def _narrowed(stage: Stage, before: Mapping[str, Stage], measured: Measured) -> Stage:
    if isinstance(stage, AnnotateStage | OnlineStage | CompareStage):
        found = measured.get(f"stages.{stage.name}.prompts")
        if found is None or not found.complete:
            return stage
        return stage.model_copy(update={"max_prompt_tokens": min(stage.max_prompt_tokens, found.longest)})
    if not isinstance(stage, Training):
        return stage
    data = getattr(stage, "data", None)
    longest = stage.max_length
    if isinstance(data, StageData):
        source = before[data.stage]
        if isinstance(source, AnnotateStage):
            longest = source.max_prompt_tokens + source.max_response_tokens
    elif (found := measured.get(f"stages.{stage.name}.data")) and found.complete:
        longest = found.longest
    return stage.model_copy(update={"max_length": min(stage.max_length, longest)})
