"""Comparison prompts are held out: no stage of the recipe has seen them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rlhf.data.reading import each_conversation, each_preference, read_labelled, read_prompts
from rlhf.data.rows import Message
from rlhf.errors import DataError
from rlhf.recipe.base import StageData
from rlhf.recipe.preference_schema import KtoStage, PreferenceStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import CompareStage, RewardStage, SftStage, Stage, SynthesizeStage


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
        case CompareStage():
            return
        case SynthesizeStage():
            for chat in each_conversation(stage.seeds):
                yield from _asked(chat.messages)
        case SftStage() | RewardStage() | PreferenceStage() if isinstance(stage.data, StageData):
            return  # what the annotate stage saw; a synthesize stage leaves out what comparisons ask
        case SftStage():
            for chat in each_conversation(stage.data):
                yield from _asked(chat.messages)
        case KtoStage():
            for answers in read_labelled(stage.data):
                yield from _asked(answers[0].prompt)
        case RewardStage() | PreferenceStage():
            for pairs in each_preference(stage.data):
                yield from _asked(pairs[0].prompt if pairs else ())
        case _ if hasattr(stage, "prompts"):
            yield from (row.text for row in read_prompts(stage.prompts))


def _asked(messages: Iterable[Message]) -> Iterator[str]:
    return (message["content"] for message in messages if message["role"] == "user")
