"""Supervised fine-tuning."""

from __future__ import annotations

from functools import partial

from rlhf.data.collate import collate
from rlhf.data.reading import read_conversations
from rlhf.data.tokenize import conversation_sequences
from rlhf.engines.objectives import Sft
from rlhf.recipe.stage_schema import SftStage
from rlhf.stages.context import StageContext
from rlhf.stages.epochs import train_epochs

Summary = dict[str, float | str | bool]


def run(stage: SftStage, context: StageContext) -> Summary:
    """Train on the assistant's tokens and save the merged model."""
    tokenizer = context.tokenizer(stage.init)
    sequences = conversation_sequences(read_conversations(stage.data), tokenizer, stage.max_length)
    policy = context.launcher.policy(context.trained("policy", "causal", stage.init, stage.optimizer, stage.lora))
    train_epochs(policy, sequences, partial(collate, pad_id=tokenizer.pad_id), Sft(), stage, context)
    policy.save(context.folder / "model").result()
    return {"rows": len(sequences)}
