"""How well a model still predicts chats that training did not aim at: what it has forgotten shows there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.data.reading import read_conversations
from rlhf.data.rows import Conversation
from rlhf.data.sequences import TokenSequence
from rlhf.errors import DataError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.stage_schema import CompareStage
from rlhf.report.samples import ChatScore
from rlhf.roles import Reference
from rlhf.stages.context import StageContext
from rlhf.stages.reference_cache import response_sums


@dataclass(frozen=True)
class Retained:
    """The chats, and how many tokens of each are the assistant's by the baseline's tokenizer."""

    rows: Sequence[Conversation]
    tokens: Sequence[int]

    @property
    def key(self) -> str:
        """What tells these chats, so counted, from others."""
        content = [[row.messages, tokens] for row, tokens in zip(self.rows, self.tokens, strict=True)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def read_retention(stage: CompareStage, context: StageContext) -> Retained | None:
    """Read the chats that a comparison names; None where it names none."""
    if stage.retention is None:
        return None
    rows = list(read_conversations(stage.retention))
    sequences = chat_sequences(rows, context.tokenizer(stage.baseline), context.checkpoint(stage.baseline))
    return Retained(rows, [sum(sequence.response_mask) for sequence in sequences])


def chat_scores(retained: Retained, policy: Reference, tokenizer: ChatTokenizer, model: Path) -> tuple[ChatScore, ...]:
    """Return -log p of what the assistant says in each chat, by a model at temperature 1.

    A model with a tokenizer of its own is asked for the same texts, and its nats are divided by the same counts.
    """
    sums = response_sums(policy, chat_sequences(retained.rows, tokenizer, model), tokenizer.pad_id)
    return tuple(ChatScore(-total, tokens) for total, tokens in zip(sums, retained.tokens, strict=True))


def chat_sequences(rows: Sequence[Conversation], tokenizer: ChatTokenizer, model: Path) -> list[TokenSequence]:
    """Tokenise the chats, the assistant's tokens marked; DataError on one with more tokens than a model's positions."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    positions = config.get("max_position_embeddings")
    sequences = []
    for row in rows:
        try:
            tokens, mask = tokenizer.conversation_ids(row.messages)
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
        if positions and len(tokens) > positions:
            raise DataError(f"{row.where}: the chat has {len(tokens)} tokens, the model {positions} positions")
        sequences.append(TokenSequence(tuple(tokens), tuple(mask)))
    return sequences
