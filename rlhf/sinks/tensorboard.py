"""TensorBoard's event files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.recipe.schema import Recipe
from rlhf.sinks.base import Sink

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FLUSH_S = 10


class TensorboardSink:
    """Event files below `tensorboard/` of the run folder, one sub-run for each stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: dict[str, SummaryWriter] = {}

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add a scalar for each metric."""
        writer = self.writers.get(stage) or self._open(stage, None)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def rewind(self, stage: str, step: int) -> None:
        """Have readers leave out what earlier files hold after a step; files are never changed."""
        if (self.folder / stage).exists():
            self._open(stage, step + 1 if step else 0)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()

    def _open(self, stage: str, purge: int | None) -> SummaryWriter:
        from torch.utils.tensorboard.writer import SummaryWriter

        if stage in self.writers:
            self.writers.pop(stage).close()
        self.writers[stage] = SummaryWriter(str(self.folder / stage), purge_step=purge, flush_secs=FLUSH_S)
        return self.writers[stage]


def open_sink(recipe: Recipe, folder: Path) -> Sink:
    """Write below the run folder."""
    return TensorboardSink(folder / "tensorboard")
