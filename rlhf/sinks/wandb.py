"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.recipe.schema import Recipe
from rlhf.sinks.base import Sink, told

OF_THE_METRICS_ALONE: dict[str, Any] = {
    "console": "off",
    "host": "hidden",
    "disable_git": True,
    "disable_code": True,
    "save_code": False,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_save_requirements": False,
}
"""wandb would send what is printed, the command line, user, host and paths of this machine, its code and packages."""


class WandbSink:
    """One wandb run for the whole recipe; offline when WANDB_API_KEY is not set, or as WANDB_MODE says.

    wandb only appends: steps that a stage makes again after a loss stand there twice, at the same `stage/step`, and a
    run that is taken up by another process is another wandb run of the same group.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        import wandb

        settings = recipe.tracking.wandb
        assert settings is not None
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self.run: Any = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=recipe.name,
            group=recipe.name,
            dir=folder,
            mode=mode,
            config=told(recipe),
            settings=wandb.Settings(**OF_THE_METRICS_ALONE),
        )
        for stage in recipe.stages:
            self.run.define_metric(f"{stage.name}/*", step_metric=f"{stage.name}/step")

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Log under `stage/name`, with the stage's own step axis."""
        self.run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

    def rewind(self, stage: str, step: int) -> None:
        """Do nothing: what is logged stays."""

    def close(self, failed: bool) -> None:
        """Finish the run."""
        self.run.finish(exit_code=int(failed))


def open_sink(recipe: Recipe, folder: Path) -> Sink:
    """Begin a wandb run."""
    return WandbSink(recipe, folder)
