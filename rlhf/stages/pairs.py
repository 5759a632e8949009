"""Where preference training gets its pairs: an earlier stage, or the user's file."""

from __future__ import annotations

import random
from dataclasses import dataclass

from rlhf.data.pairs import Pair, pair_sequences, read_pairs
from rlhf.data.reading import read_preferences
from rlhf.data.tokenize import TokenPair, preference_sequences
from rlhf.errors import DataError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.base import StageData
from rlhf.recipe.stage_schema import DpoStage, RewardStage
from rlhf.stages.context import StageContext


@dataclass(frozen=True)
class PairSplit:
    """Pairs to train on and pairs held out; `judged` are the held-out rows of an annotate stage (with scores)."""

    train: list[TokenPair]
    heldout: list[TokenPair]
    judged: list[Pair]


def load_pairs(stage: RewardStage | DpoStage, context: StageContext, tokenizer: ChatTokenizer) -> PairSplit:
    """Read and split the pairs that a stage trains on."""
    if isinstance(stage.data, StageData):
        rows = read_pairs(context.outputs[stage.data.stage] / "pairs.jsonl")
        judged = [row for row in rows if row.heldout]
        return PairSplit(pair_sequences([row for row in rows if not row.heldout]), pair_sequences(judged), judged)
    pairs = preference_sequences(read_preferences(stage.data), tokenizer, stage.max_length)
    order = list(range(len(pairs)))
    random.Random(context.seed("split")).shuffle(order)
    cut = round(len(pairs) * stage.heldout_fraction)
    if cut == len(pairs):
        raise DataError(f"all {cut} pairs are held out; lower stages.{stage.name}.heldout_fraction")
    return PairSplit([pairs[i] for i in sorted(order[cut:])], [pairs[i] for i in sorted(order[:cut])], [])
