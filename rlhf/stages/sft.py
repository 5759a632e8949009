"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from rlhf.data.best import best_sequences, each_best
from rlhf.data.collate import collate
from rlhf.data.sequences import TokenSequence
from rlhf.data.store import stored
from rlhf.data.synthesized import CHATS, synthesized_source
from rlhf.data.tokenized import Encoder, tokenized_chats
from rlhf.engines.objectives import Sft
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.base import StageData
from rlhf.recipe.stage_schema import SftStage
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs
from rlhf.stages.heldout import split_sequences

Summary = dict[str, float | str | bool]


def run(stage: SftStage, context: StageContext) -> Summary:
    """Train on the assistant's tokens and save the merged model.

    The data are a file's chats, those of a synthesize stage, or the best samples of an annotate stage.
    """
    tokenizer = context.tokenizer(stage.init)
    train, heldout = split_sequences(stage, _sequences(stage, context, tokenizer), context)
    policy = context.launcher.policy(context.trained("policy", "causal", stage.init, stage.optimizer, stage.tuning))
    trained = train_epochs(policy, train, partial(collate, pad_id=tokenizer.pad_id), Sft(), stage, context, heldout)
    context.save(policy)
    return {"rows": len(train), "heldout_rows": len(heldout), **trained.summary()}


def _sequences(stage: SftStage, context: StageContext, tokenizer: ChatTokenizer) -> Sequence[TokenSequence]:
    encoder = Encoder(tokenizer, stage.max_length, context.tracker.say)
    if isinstance(stage.data, StageData):
        folder = context.outputs[stage.data.stage]
        if (folder / CHATS).is_file():
            return tokenized_chats(synthesized_source(folder), encoder)
        return stored(best_sequences(each_best(folder / "best.jsonl")))
    return tokenized_chats(stage.data, encoder)
