"""Comparison prompts are held out: no stage of the recipe has seen them."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.data.reading import each_conversation, each_preference, read_labelled, read_prompts
from rlhf.errors import DataError
from rlhf.recipe.base import HubData, PathData, StageData
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.preference_schema import KtoStage, PreferenceStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import AnnotateStage, CompareStage, RewardStage, SftStage, Stage, SynthesizeStage


def check_disjoint(recipe: Recipe) -> None:
    """Raise DataError when a stage trains or annotates on prompts that a later comparison judges on."""
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, CompareStage):
            held_out = {row.text for row in read_prompts(stage.prompts)}
            for earlier in recipe.stages[:index]:
                _check(earlier, held_out, stage.name)


def _check(stage: Stage, held_out: set[str], name: str) -> None:
    if shared := held_out.intersection(_seen(stage)):
        raise DataError(
            f"{len(shared)} of {len(held_out)} prompts of stages.{name} are also in stages.{stage.name},"
            f" for example {min(shared)!r}; hold them out"
        )


def _seen(stage: Stage) -> Iterator[str]:
    """Yield all that users ask in a stage's files; they are never in memory together."""
    match stage:
        case SynthesizeStage():
            chats = (chat.messages for chat in each_conversation(stage.seeds))
        case SftStage(data=PathData() | HubData() as data):
            chats = (chat.messages for chat in each_conversation(data))
        case KtoStage(data=PathData() | HubData() as data):
            chats = (answers[0].prompt for answers in read_labelled(data))
        case RewardStage() | PreferenceStage() if not isinstance(stage.data, StageData):
            chats = (pairs[0].prompt for pairs in each_preference(stage.data) if pairs)
        case AnnotateStage() | OnlineStage():
            chats = (row.messages[-1:] for row in read_prompts(stage.prompts))
        case _:  # what an annotate stage saw; a synthesize stage leaves out what comparisons ask
            return
    for messages in chats:
        yield from (message["content"] for message in messages if message["role"] == "user")
