"""trackio's local database."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from rlhf.recipe.schema import Recipe
from rlhf.sinks.base import Sink, told


class TrackioSink:
    """One trackio run for each stage, `recipe/stage`, in a project's database: TRACKIO_DIR, or trackio's own place.

    Rows are written to the database directly. `trackio.init` would ask the Hugging Face hub who the user is and, as
    its environment variables say, send metrics to a server.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        settings = recipe.tracking.trackio
        assert settings is not None
        self.storage = SQLiteStorage
        self.storage._dataset_import_attempted = True  # or it may fetch from the hub what TRACKIO_BUCKET_ID names
        self.project = settings.project
        self.storage.validate_project_name(self.project)
        self.database = Path(self.storage.init_db(self.project))
        self.name, self.folder = recipe.name, folder
        self.config = {**told(recipe), "_Group": recipe.name}

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Insert a row."""
        self.storage.bulk_log(
            project=self.project,
            run=f"{self.name}/{stage}",
            metrics_list=[dict(metrics)],
            steps=[step],
            config=self.config,
            run_id=self._id(stage),
        )

    def rewind(self, stage: str, step: int) -> None:
        """Delete the stage's rows after a step, all of them at 0."""
        with closing(sqlite3.connect(self.database, timeout=30)) as database, database:
            after = step if step else -1
            database.execute("DELETE FROM metrics WHERE run_id = ? AND step > ?", (self._id(stage), after))

    def close(self, failed: bool) -> None:
        """Do nothing: every row is there already."""

    def _id(self, stage: str) -> str:
        """Return what a stage of this run folder is always known by."""
        return hashlib.blake2b(str(self.folder / stage).encode(), digest_size=16).hexdigest()


def open_sink(recipe: Recipe, folder: Path) -> Sink:
    """Open the project's database."""
    return TrackioSink(recipe, folder)
