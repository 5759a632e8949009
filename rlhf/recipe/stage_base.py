"""What stages have in common."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rlhf.recipe.base import Optimizer, Strict
from rlhf.recipe.tuning_schema import Tuning

NAME = r"^[a-z][a-z0-9_-]*$"
MARK = "@"
"""Between the name of a stage and the seed of one of its runs: `ppo@2`."""


class StageBase(Strict):
    """What all stages have."""

    name: str = Field(pattern=NAME)
    seed: int | None = Field(None, ge=0, lt=2**31, description="overrides the recipe's `seed` for this stage")
    max_tokens_per_microbatch: PositiveInt | None = Field(
        None,
        description="tokens in one forward/backward pass; results do not depend on it; unset is 4096 on a GPU and "
        "1024 on the CPU, where larger passes take more memory and are not faster",
    )


class Training(StageBase):
    """What all stages that train have; `batch_size` counts sequences (or pairs) per optimizer step."""

    tuning: Tuning | None = Field(None, description="which weights train; overrides the recipe's")
    optimizer: Optimizer = Optimizer()
    batch_size: PositiveInt = 16
    epochs: PositiveInt = 1
    evaluations: PositiveInt | None = Field(
        None, description="evaluate on the held-out rows so often in the stage, evenly; unset is once per epoch"
    )
    keep: Literal["best", "last"] = Field(
        "best", description="the model that stays: that of the lowest held-out loss, or the last one"
    )
    max_length: PositiveInt = Field(1024, description="prompt + response tokens; longer rows are errors")
