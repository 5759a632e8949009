"""The loss of a reward model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor, margins: Tensor) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin) of each pair, `[P]`; a margin is 0 when unknown.

    Bradley and Terry 1952, as in Ouyang et al. 2022, eq. 1; with margin Touvron et al. 2023 (Llama 2), eq. 2.
    """
    return -functional.logsigmoid(chosen_scores - rejected_scores - margins)
