"""Supervised fine-tuning."""

from __future__ import annotations

from functools import partial

from rlhf.data.best import best_sequences, read_best
from rlhf.data.collate import collate
from rlhf.data.reading import read_conversations
from rlhf.data.sequences import TokenSequence
from rlhf.data.tokenize import conversation_sequences
from rlhf.engines.objectives import Sft
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.base import StageData
from rlhf.recipe.stage_schema import SftStage
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs

Summary = dict[str, float | str | bool]


def run(stage: SftStage, context: StageContext) -> Summary:
    """Train on the assistant's tokens, or on the best samples of an annotate stage, and save the merged model."""
    tokenizer = context.tokenizer(stage.init)
    sequences = _sequences(stage, context, tokenizer)
    policy = context.launcher.policy(context.trained("policy", "causal", stage.init, stage.optimizer, stage.lora))
    train_epochs(policy, sequences, partial(collate, pad_id=tokenizer.pad_id), Sft(), stage, context)
    policy.save(context.folder / "model").result()
    return {"rows": len(sequences)}


def _sequences(stage: SftStage, context: StageContext, tokenizer: ChatTokenizer) -> list[TokenSequence]:
    if isinstance(stage.data, StageData):
        return best_sequences(read_best(context.outputs[stage.data.stage] / "best.jsonl"))
    return conversation_sequences(read_conversations(stage.data), tokenizer, stage.max_length)
