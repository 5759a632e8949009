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
from rlhf.data.store import stored
from rlhf.errors import DataError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.stage_schema import CompareStage
from rlhf.stages.context import StageContext


@dataclass(frozen=True)
class Retained:
    """The chats, and how many tokens of each are the assistant's by the baseline's tokenizer."""

    rows: Sequence[Conversation]
    tokens: Sequence[int]

    @property
    def key(self) -> str:
        """What tells these chats, so counted, from others."""
        digest = hashlib.sha256()
        for number, (row, tokens) in enumerate(zip(self.rows, self.tokens, strict=True)):
            digest.update(f"{', ' if number else '['}{json.dumps([row.messages, tokens])}".encode())
        digest.update(b"]")
        return digest.hexdigest()


def read_retention(stage: CompareStage, context: StageContext) -> Retained | None:
    """Read the chats that a comparison names; None where it names none."""
    if stage.retention is None:
        return None
    rows = list(read_conversations(stage.retention))
    sequences = chat_sequences(rows, context.tokenizer(stage.baseline), context.checkpoint(stage.baseline))
    return Retained(rows, [sum(sequence.response_mask) for sequence in sequences])


def chat_sequences(rows: Sequence[Conversation], tokenizer: ChatTokenizer, model: Path) -> Sequence[TokenSequence]:
    """Tokenise the chats, the assistant's tokens marked, and keep the tokens on disk.

    DataError on a chat with more tokens than the model has positions.
    """
    positions = json.loads((model / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
    return stored(_chat_sequence(row, tokenizer, positions) for row in rows)


def _chat_sequence(row: Conversation, tokenizer: ChatTokenizer, positions: int | None) -> TokenSequence:
    try:
        tokens, mask = tokenizer.conversation_ids(row.messages)
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from error
    if positions and len(tokens) > positions:
        raise DataError(f"{row.where}: the chat has {len(tokens)} tokens, the model {positions} positions")
    return TokenSequence(tuple(tokens), tuple(mask))
