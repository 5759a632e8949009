"""Where preference training gets its pairs: an earlier stage, or the user's file."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from rlhf.data.pairs import Pair, pair_sequences, read_pairs
from rlhf.data.reading import read_labelled, read_preferences
from rlhf.data.sequences import LabelledSequence, TokenPair
from rlhf.data.tokenize import labelled_sequences, preference_sequences
from rlhf.errors import DataError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.base import StageData
from rlhf.recipe.preference_schema import AnyPairStage, KtoStage
from rlhf.recipe.stage_schema import RewardStage
from rlhf.stages.context import StageContext

Row = TypeVar("Row")


@dataclass(frozen=True)
class PairSplit:
    """Pairs to train on and pairs held out; `judged` are the held-out rows of an annotate stage (with scores)."""

    train: list[TokenPair]
    heldout: list[TokenPair]
    judged: list[Pair]


@dataclass(frozen=True)
class ExampleSplit:
    """Labelled responses to train on and some held out; `paired` ones are the chosen and rejected of pairs in turn."""

    train: list[LabelledSequence]
    heldout: list[LabelledSequence]
    paired: bool


def load_pairs(stage: RewardStage | AnyPairStage, context: StageContext, tokenizer: ChatTokenizer) -> PairSplit:
    """Read and split the pairs that a stage trains on."""
    if isinstance(stage.data, StageData):
        train, judged = _annotated(stage.data, context)
        return PairSplit(pair_sequences(train), pair_sequences(judged), judged)
    pairs = preference_sequences(read_preferences(stage.data), tokenizer, stage.max_length)
    return PairSplit(*_split(pairs, "pairs", stage, context), [])


def load_examples(stage: KtoStage, context: StageContext, tokenizer: ChatTokenizer) -> ExampleSplit:
    """Read and split labelled responses; a pair gives a desirable and an undesirable one, on the same side."""
    if isinstance(stage.data, StageData):
        learned, judged = _annotated(stage.data, context)
        return ExampleSplit(_unpaired(pair_sequences(learned)), _unpaired(pair_sequences(judged)), True)
    rows = read_labelled(stage.data)
    sides = _split(rows, "rows", stage, context)
    train, heldout = (labelled_sequences(list(chain(*side)), tokenizer, stage.max_length) for side in sides)
    return ExampleSplit(train, heldout, len(rows[0]) == 2)


def _annotated(data: StageData, context: StageContext) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs of an annotate stage: those to train on, and those held out."""
    rows = read_pairs(context.outputs[data.stage] / "pairs.jsonl")
    return [row for row in rows if not row.heldout], [row for row in rows if row.heldout]


def _unpaired(pairs: Iterable[TokenPair]) -> list[LabelledSequence]:
    return [
        LabelledSequence(side, desirable)
        for pair in pairs
        for side, desirable in ((pair.chosen, True), (pair.rejected, False))
    ]


def _split(
    rows: Sequence[Row], what: str, stage: RewardStage | AnyPairStage | KtoStage, context: StageContext
) -> tuple[list[Row], list[Row]]:
    """Return a file's rows to train on and a random share of them held out, both in the file's order."""
    order = list(range(len(rows)))
    random.Random(context.seed("split")).shuffle(order)
    cut = round(len(rows) * stage.heldout_fraction)
    if cut == len(rows):
        raise DataError(f"all {cut} {what} are held out; lower stages.{stage.name}.heldout_fraction")
    return [rows[i] for i in sorted(order[cut:])], [rows[i] for i in sorted(order[:cut])]
