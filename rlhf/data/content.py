"""What a source and a tokenizer are made of: equal digests mean that the same rows come to the same tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.fingerprint import file_digest
from rlhf.recipe.base import HubData, PathData

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer

LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow")
READING, TOKENISING = 1, 1
"""Raised when the same files come to other rows, or the same rows to other tokens: what is kept is then made anew."""


@dataclass(frozen=True)
class SourceContent:
    """What a source holds: `content`, in JSON, tells it from others while `unchanged`."""

    content: Mapping[str, Any]
    unchanged: Callable[[], bool]


def source_content(source: PathData | HubData) -> SourceContent | None:
    """Return what tells a source's rows: the bytes of its files and how they are read; None where nothing does."""
    files = _files(source)
    try:
        before = _stats(files)
        digests = [file_digest(file) for file in files]
    except OSError:
        return None
    if not files:
        return None
    read = source.model_dump(mode="json", exclude={"path", "hub", "revision"})
    kind = source.path.suffix.lower() if isinstance(source, PathData) else source.hub
    content = {"code": READING, "kind": kind, "files": digests, "read": read}
    return SourceContent(content, lambda: _same(files, before))


def tokenizer_content(tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Return what tells how a tokenizer encodes: all of it, its template, and the libraries."""
    return {
        "code": TOKENISING,
        "tokenizer": tokenizer.identity(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def digest(text: str) -> bytes:
    """Return 16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _files(source: PathData | HubData) -> list[Path]:
    """Return the files that a source's rows lie in: of a hub dataset, those that the library has made of it."""
    if isinstance(source, PathData):
        return [source.path]
    from rlhf.data.records import hub_table

    return [Path(part["filename"]) for part in hub_table(source).cache_files]


def _stats(files: list[Path]) -> list[tuple[int, int]]:
    return [(found.st_size, found.st_mtime_ns) for found in (file.stat() for file in files)]


def _same(files: list[Path], before: list[tuple[int, int]]) -> bool:
    try:
        return _stats(files) == before
    except OSError:
        return False
