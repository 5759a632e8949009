"""Comparison prompts are held out: no stage of the recipe has seen them.

Texts are compared by digests of 16 bytes, which are kept for each source, so that a large one is read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from rlhf.data.content import digest
from rlhf.data.reading import Say, each_conversation, each_labelled, each_preference, each_prompt
from rlhf.data.recognise import Purpose
from rlhf.data.splits import digest_array, group_numbers
from rlhf.data.tokenized import kept_file
from rlhf.errors import DataError
from rlhf.recipe.base import HubData, PathData, StageData
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.preference_schema import KtoStage, PreferenceStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import AnnotateStage, CompareStage, RewardStage, SftStage, Stage, SynthesizeStage

if TYPE_CHECKING:
    import pyarrow

Source = PathData | HubData


def check_disjoint(recipe: Recipe) -> None:
    """Raise DataError when a stage trains or annotates on prompts that a later comparison judges on."""
    for index, stage in enumerate(recipe.stages):
        if isinstance(stage, CompareStage):
            held_out = _asked(stage.prompts, "prompts")
            for earlier in recipe.stages[:index]:
                _check(earlier, held_out, stage)


def _check(stage: Stage, held_out: np.ndarray, comparison: CompareStage) -> None:
    read = _read(stage)
    if read is None:
        return
    numbers = group_numbers(np.concatenate([held_out, _asked(*read)]))
    shared = np.intersect1d(numbers[: len(held_out)], numbers[len(held_out) :])
    if len(shared):
        digests = {held_out[place].tobytes() for place in np.flatnonzero(np.isin(numbers[: len(held_out)], shared))}
        example = min(text for text in _texts(comparison.prompts, "prompts") if digest(text) in digests)
        raise DataError(
            f"{len(shared)} of {len(held_out)} prompts of stages.{comparison.name} are also in stages.{stage.name},"
            f" for example {example!r}; hold them out"
        )


def _read(stage: Stage) -> tuple[Source, Purpose] | None:
    """Return the source in which a stage sees what users ask, and what it reads it for."""
    match stage:
        case SynthesizeStage():
            return stage.seeds, "conversations"
        case SftStage(data=PathData() | HubData() as data):
            return data, "conversations"
        case KtoStage(data=PathData() | HubData() as data):
            return data, "labelled"
        case RewardStage() | PreferenceStage() if not isinstance(stage.data, StageData):
            return stage.data, "preferences"
        case AnnotateStage() | OnlineStage():
            return stage.prompts, "prompts"
        case _:  # what an annotate stage saw; a synthesize stage leaves out what comparisons ask
            return None


def _asked(source: Source, purpose: Purpose) -> np.ndarray:
    """Return the digests of all different texts that users say in a source, `[texts, 2]` uint64."""
    import pyarrow

    schema = pyarrow.schema([("digest", pyarrow.binary(16))])

    def batches(say: Say) -> Iterator[pyarrow.RecordBatch]:
        found = digest_array(map(digest, _texts(source, purpose, say)))
        _, firsts = np.unique(group_numbers(found), return_index=True)
        data = pyarrow.py_buffer(found[firsts].tobytes())
        array = pyarrow.FixedSizeBinaryArray.from_buffers(pyarrow.binary(16), len(firsts), [None, data])
        yield pyarrow.RecordBatch.from_arrays([array], schema=schema)

    file = kept_file(source, {"kind": f"asked in {purpose}"}, schema, batches)
    return digest_array(value for batch in file.batches for value in batch.column(0).to_pylist())


def _texts(source: Source, purpose: Purpose, say: Say = lambda _: None) -> Iterator[str]:
    """Yield all that users say in a source: of prompts what comes last, the turn to be answered."""
    match purpose:
        case "labelled":
            chats = (answers[0].prompt for answers in each_labelled(source, say))
        case "preferences":
            chats = (pairs[0].prompt for pairs in each_preference(source, say) if pairs)
        case "prompts":
            chats = (row.messages[-1:] for row in each_prompt(source, say))
        case _:
            chats = (chat.messages for chat in each_conversation(source, say))
    for messages in chats:
        yield from (message["content"] for message in messages if message["role"] == "user")
