"""Learning-rate schedules as a factor on the base rate."""

from __future__ import annotations

import math

from rlhf.recipe.base import Optimizer


def lr_scale(optimizer: Optimizer, step: int, total: int) -> float:
    """Return the factor for step `step` (from 0) of `total`: linear warm-up, then the schedule towards 0."""
    if step < optimizer.warmup_steps:
        return (step + 1) / (optimizer.warmup_steps + 1)
    if optimizer.schedule == "constant":
        return 1.0
    done = (step - optimizer.warmup_steps) / max(1, total - optimizer.warmup_steps)
    return 1.0 - done if optimizer.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
