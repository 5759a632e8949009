"""The recipe: every key a user can write, its type, its bounds and its one default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rlhf.recipe.base import Budget, Dtype, Strict
from rlhf.recipe.role_schema import Roles
from rlhf.recipe.stage_schema import Stage
from rlhf.recipe.tuning_schema import Lora, Tuning

FILE_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What names a folder: no separator, and nothing that leads out of the one above."""


class ModelSource(Strict):
    """The base model: a hub id, a local folder, `gguf://package/file.gguf` or `tiny://llama` (random, for tests)."""

    path: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto",
        description="of the weights; `auto` is bfloat16 on GPUs that have it and on CPUs that are faster in it, "
        "float32 elsewhere, and a run folder keeps what it began in",
    )
    chat_template: Path | None = Field(None, description="a Jinja file that replaces the tokenizer's chat template")

    @property
    def precision(self) -> Dtype:
        """The dtype of the weights, once it is decided (`rlhf.recipe.dtype`)."""
        assert self.dtype != "auto", "model.dtype: auto is not decided yet"
        return self.dtype


class Wandb(Strict):
    """Weights & Biases as an extra sink; the key comes from WANDB_API_KEY, offline without one."""

    project: str
    entity: str | None = None


class Trackio(Strict):
    """trackio as an extra sink: its local database, in TRACKIO_DIR or trackio's own folder; nothing is sent."""

    project: str = Field(pattern=FILE_NAME)


class Tracking(Strict):
    """Where metrics go beside `metrics.jsonl`."""

    wandb: Wandb | None = None
    tensorboard: bool = Field(False, description="event files in the run folder, `tensorboard/<stage>`")
    trackio: Trackio | None = None


class Ray(Strict):
    """How to reach Ray: unset starts a local one on loopback."""

    address: str | None = Field(None, pattern=r"^(auto|[^/]+:\d+)$", description="host:port of a running Ray, or auto")
    placement_timeout_s: NonNegativeFloat = 180
    call_timeout_s: NonNegativeFloat = Field(
        1800, description="so long may a process that works on a call make no progress; the call itself may take longer"
    )
    start_timeout_s: NonNegativeFloat = Field(
        900, description="so long may a process that starts make no progress until it answers"
    )


class Best(Strict):
    """Which of a stage's steps was best."""

    metric: str = Field(description="a column of metrics.jsonl, such as reward or loss")
    mode: Literal["max", "min"] = "max"


class Recovery(Strict):
    """What is kept of unfinished stages, to resume an interrupted or failed run, and of finished ones that changed."""

    every_minutes: NonNegativeFloat = Field(10, description="save the state of all roles that often; 0 is every step")
    every_steps: PositiveInt | None = Field(None, description="save after so many steps instead")
    keep_last: PositiveInt = Field(2, description="so many states stay on disk")
    keep_best: Best | None = Field(None, description="one more stays: the best step so far")
    keep_old: NonNegativeInt = Field(
        1, description="so many finished versions of each stage stay when a changed one has taken their place"
    )
    restarts: NonNegativeInt = Field(
        3, description="so often may a role's processes be replaced in a run, and a stage go on after a loss"
    )


class Recipe(Strict):
    """One alignment run."""

    name: str = Field(pattern=FILE_NAME)
    seed: int = Field(17, ge=0, lt=2**31)
    model: ModelSource
    tuning: Tuning = Lora()
    backend: Literal["ray", "local"] = "ray"
    ray: Ray = Ray()
    roles: Roles = Roles()
    tracking: Tracking = Tracking()
    recovery: Recovery = Recovery()
    checkpoints: dict[Annotated[str, Field(pattern=FILE_NAME)], str] = Field(
        default_factory=dict, description="name -> folder or hub id: models from elsewhere that stages may refer to"
    )
    seeds: list[int] = Field(
        default_factory=list, description="run every preference and online stage once per seed, each as a branch"
    )
    budget: Budget | None = Field(None, description="the same limit for every preference and online stage")
    on_diagnosis: Literal["warn", "stop"] = Field(
        "warn", description="what a diagnosis like a KL blow-up does to a stage that trains"
    )
    on_low_memory: Literal["stop", "warn"] = Field(
        "stop", description="what becomes of a run on this machine that is estimated to need more memory than is free"
    )
    output_dir: Path = Field(Path("runs"), description="run folders are made here, relative to the working directory")
    stages: list[Stage] = Field(min_length=1)
