"""The folder where converted models are kept between runs, each written once and then only read."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from rlhf.allocator import give_back
from rlhf.cache import default_cache, hold
from rlhf.patient_lock import held

__all__ = ["build_once", "default_cache", "file_digest", "held_model"]


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def build_once(cache: Path, name: str, key: str, build: Callable[[Path], object]) -> Path:
    """Return `cache/models/<name>-<digest of key>`; when it is not there yet, `build` writes it.

    `build` fills a folder beside it that is renamed when complete, under a lock, so that a run that is killed
    or that runs at the same time never leaves or sees half a model; whoever waits for another process says so. The
    digest covers the version of transformers, whose conversion a cached folder is.
    """
    digest = hashlib.sha256(f"{key}\n{version('transformers')}".encode()).hexdigest()[:12]
    target = cache / "models" / f"{name}-{digest}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    with held(target.with_name(f".{target.name}.lock"), f"converting the model {name}"):
        if not target.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            build(partial)
            partial.rename(target)
            give_back()
    return target


def held_model(cache: Path, name: str, key: str, build: Callable[[Path], object]) -> Path:
    """Return what `build_once` returns, held by this process: pruning leaves it alone until the process ends."""
    while not hold(folder := build_once(cache, name, key, build)):
        continue  # removed in that instant
    return folder
