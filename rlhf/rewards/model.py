"""A trained reward model as the source of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rlhf.data.collate import collate_rollouts
from rlhf.roles import Pending, Scalar
from rlhf.types import Rollout


@dataclass(frozen=True)
class ModelReward:
    """Scores rollouts by token ids; the reward model shares the policy's tokenizer (same lineage)."""

    model: Scalar
    pad_id: int

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Tensor]:
        """Return the reward model's score of each rollout, `[B]`."""
        return self.model.scores(collate_rollouts(rollouts, self.pad_id))
