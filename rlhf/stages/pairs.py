"""Where preference training gets its pairs: an earlier stage, or the user's file."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.lazy import Lazy
from rlhf.data.pairs import Pair, lazy_pairs, pair_sequences
from rlhf.data.sequences import LabelledSequence, TokenPair
from rlhf.data.splits import Digests, by_group
from rlhf.data.tokenized import Encoder, tokenized_answers, tokenized_pairs
from rlhf.errors import DataError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.base import StageData
from rlhf.recipe.preference_schema import AnyPairStage, KtoStage
from rlhf.recipe.stage_schema import RewardStage
from rlhf.stages.context import StageContext
from rlhf.stages.heldout import Picked


@dataclass(frozen=True)
class PairSplit:
    """Pairs to train on and pairs held out; `judged` are the held-out rows of an annotate stage (with scores)."""

    train: Sequence[TokenPair]
    heldout: Sequence[TokenPair]
    judged: Sequence[Pair]


@dataclass(frozen=True)
class ExampleSplit:
    """Labelled responses to train on and some held out; `paired` ones are the chosen and rejected of pairs in turn."""

    train: Sequence[LabelledSequence]
    heldout: Sequence[LabelledSequence]
    paired: bool


def load_pairs(stage: RewardStage | AnyPairStage, context: StageContext, tokenizer: ChatTokenizer) -> PairSplit:
    """Read and split the pairs that a stage trains on."""
    if isinstance(stage.data, StageData):
        learned, judged = _annotated(stage.data, context)
        return PairSplit(pair_sequences(learned), pair_sequences(judged), judged)
    sides = tokenized_pairs(stage.data, Encoder(tokenizer, stage.max_length, context.tracker.say))
    margins = sides.column("margin")
    pairs = Lazy(lambda i: TokenPair(sides[2 * i], sides[2 * i + 1], float(margins[2 * i])), len(sides) // 2)
    train, heldout = (Picked(pairs, rows) for rows in _split(sides.digests("prompt")[::2], "pairs", stage, context))
    return PairSplit(train, heldout, [])


def load_examples(stage: KtoStage, context: StageContext, tokenizer: ChatTokenizer) -> ExampleSplit:
    """Read and split labelled responses; a pair gives a desirable and an undesirable one, on the same side."""
    if isinstance(stage.data, StageData):
        learned, judged = _annotated(stage.data, context)
        return ExampleSplit(_unpaired(pair_sequences(learned)), _unpaired(pair_sequences(judged)), True)
    tokens = tokenized_answers(stage.data, Encoder(tokenizer, stage.max_length, context.tracker.say))
    desirable, width = tokens.column("desirable"), int(tokens.column("answers")[0])
    answers = Lazy(lambda i: LabelledSequence(tokens[i], bool(desirable[i])), len(tokens))
    records = _split(tokens.digests("prompt")[::width], "rows", stage, context)
    train, heldout = (
        Picked(answers, array("q", (width * row + place for row in rows for place in range(width)))) for rows in records
    )
    return ExampleSplit(train, heldout, width == 2)


def _annotated(data: StageData, context: StageContext) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Return the pairs of an annotate stage, read from its file as they are needed: to train on, and held out."""
    rows = lazy_pairs(context.outputs[data.stage] / "pairs.jsonl")
    heldout = [row.heldout for row in rows]
    learned, judged = ([place for place, held in enumerate(heldout) if held is side] for side in (False, True))
    return Picked(rows, learned), Picked(rows, judged)


def _unpaired(pairs: Sequence[TokenPair]) -> Sequence[LabelledSequence]:
    def answer(place: int) -> LabelledSequence:
        pair = pairs[place // 2]
        return LabelledSequence(pair.rejected, False) if place % 2 else LabelledSequence(pair.chosen, True)

    return Lazy(answer, 2 * len(pairs))


def _split(
    prompts: Digests, what: str, stage: RewardStage | AnyPairStage | KtoStage, context: StageContext
) -> tuple[Sequence[int], Sequence[int]]:
    """Return a file's rows to train on and those of a random share of its prompts, held out, both in its order."""
    train, heldout = by_group(prompts, stage.heldout_fraction, random.Random(context.seed("split")))
    if not train:
        raise DataError(f"all {len(prompts)} {what} are held out; lower stages.{stage.name}.heldout_fraction")
    return train, heldout
