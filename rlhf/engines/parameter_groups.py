"""AdamW over a model's parameters: a fresh scalar head may learn at a rate of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.recipe.base import Optimizer

HEAD = "score."


def build_adamw(
    named: Sequence[tuple[str, Tensor]], settings: Optimizer, head_learning_rate: float | None
) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov and Hutter 2019) over (name, parameter) pairs, the scalar head in a group of its own.

    Without `head_learning_rate` the head learns at the rate of the body.
    """
    body_rate = settings.learning_rate
    head_rate = body_rate if head_learning_rate is None else head_learning_rate
    head = [parameter for name, parameter in named if HEAD in name]
    body = [parameter for name, parameter in named if HEAD not in name]
    groups = [
        {"params": parameters, "lr": rate, "base_lr": rate}
        for parameters, rate in ((body, body_rate), (head, head_rate))
        if parameters
    ]
    return torch.optim.AdamW(groups, betas=settings.betas, weight_decay=settings.weight_decay, fused=True)


def scale_learning_rates(optimizer: torch.optim.Optimizer, lr_scale: float) -> None:
    """Set each group's learning rate to `lr_scale` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * lr_scale
