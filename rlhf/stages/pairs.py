"""Where preference training gets its pairs: an earlier stage, or the user's file."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlhf.data.lazy import Lazy
from rlhf.data.pairs import Pair, lazy_pairs, pair_sequences
from rlhf.data.reading import each_preference, read_labelled
from rlhf.data.rows import Message
from rlhf.data.sequences import LabelledSequence, TokenPair, TokenSequence
from rlhf.data.store import stored
from rlhf.data.tokenize import labelled_sequences, preference_sequence
from rlhf.errors import DataError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.base import HubData, PathData, StageData
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

    train: list[LabelledSequence]
    heldout: list[LabelledSequence]
    paired: bool


def load_pairs(stage: RewardStage | AnyPairStage, context: StageContext, tokenizer: ChatTokenizer) -> PairSplit:
    """Read and split the pairs that a stage trains on."""
    if isinstance(stage.data, StageData):
        learned, judged = _annotated(stage.data, context)
        return PairSplit(pair_sequences(learned), pair_sequences(judged), judged)
    pairs, prompts = _stored_pairs(stage.data, tokenizer, stage.max_length)
    train, heldout = (Picked(pairs, rows) for rows in _split(prompts, "pairs", stage, context))
    return PairSplit(train, heldout, [])


def load_examples(stage: KtoStage, context: StageContext, tokenizer: ChatTokenizer) -> ExampleSplit:
    """Read and split labelled responses; a pair gives a desirable and an undesirable one, on the same side."""
    if isinstance(stage.data, StageData):
        learned, judged = _annotated(stage.data, context)
        return ExampleSplit(_unpaired(pair_sequences(learned)), _unpaired(pair_sequences(judged)), True)
    rows = read_labelled(stage.data)
    sides = _split([_digest(answers[0].prompt) for answers in rows], "rows", stage, context)
    train, heldout = (
        labelled_sequences([answer for row in side for answer in rows[row]], tokenizer, stage.max_length)
        for side in sides
    )
    return ExampleSplit(train, heldout, len(rows[0]) == 2)


def _annotated(data: StageData, context: StageContext) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Return the pairs of an annotate stage, read from its file as they are needed: to train on, and held out."""
    rows = lazy_pairs(context.outputs[data.stage] / "pairs.jsonl")
    heldout = [row.heldout for row in rows]
    learned, judged = ([place for place, held in enumerate(heldout) if held is side] for side in (False, True))
    return Picked(rows, learned), Picked(rows, judged)


def _unpaired(pairs: Iterable[TokenPair]) -> list[LabelledSequence]:
    return [
        LabelledSequence(side, desirable)
        for pair in pairs
        for side, desirable in ((pair.chosen, True), (pair.rejected, False))
    ]


def _stored_pairs(
    data: PathData | HubData, tokenizer: ChatTokenizer, max_length: int
) -> tuple[Lazy[TokenPair], list[bytes]]:
    """Return the pairs of a file, tokenised on disk, and what tells the prompt of each."""
    prompts: list[bytes] = []
    margins: list[float] = []

    def sides() -> Iterator[TokenSequence]:
        for row in each_preference(data):
            for answers in row:
                pair = preference_sequence(answers, tokenizer, max_length)
                prompts.append(_digest(answers.prompt))
                margins.append(pair.margin)
                yield from (pair.chosen, pair.rejected)

    tokens = stored(sides())
    return Lazy(lambda i: TokenPair(tokens[2 * i], tokens[2 * i + 1], margins[i]), len(margins)), prompts


def _digest(prompt: Sequence[Message]) -> bytes:
    return hashlib.blake2b(json.dumps(prompt).encode(), digest_size=16).digest()


def _split(
    prompts: Sequence[bytes], what: str, stage: RewardStage | AnyPairStage | KtoStage, context: StageContext
) -> tuple[list[int], list[int]]:
    """Return a file's rows to train on and those of a random share of its prompts, held out, both in its order."""
    rows: dict[bytes, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    groups = list(rows.values())
    random.Random(context.seed("split")).shuffle(groups)
    cut = round(len(groups) * stage.heldout_fraction)
    if cut == len(groups):
        raise DataError(f"all {len(prompts)} {what} are held out; lower stages.{stage.name}.heldout_fraction")
    heldout, train = ([row for group in part for row in group] for part in (groups[:cut], groups[cut:]))
    return sorted(train), sorted(heldout)
