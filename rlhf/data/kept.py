"""Arrow files in the user's cache, each named by all that its content depends on: what was made once is found again.

A file is written under the name `.<name>.<pid>.partial`, locked (`flock`) while its process lives, and takes its own
name whole or not at all; partial files of processes that are no more are removed by the next one that writes. Behind
the Arrow data follow notes (JSON), their length and the SHA-256 of everything before it, so that a damaged file is
found and made anew. Files below `KEPT_BYTES` are not worth a name: they are made again sooner than they are looked for.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rlhf.cache import default_cache
from rlhf.disk import failures_told

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger("rlhf")

FOLDER, SUFFIX, PARTIAL = "tokens", ".arrow", ".partial"
KEPT_BYTES = 1 << 20
"""Smaller files lose their name as soon as they are mapped."""

LENGTH, SEAL, CHUNK = 8, hashlib.sha256().digest_size, 1 << 20
REFUSED = "tokenised data cannot be written to the cache (RLHF_CACHE names another place)"


@dataclass(frozen=True)
class Mapped:
    """The batches of a file, mapped into memory; `notes` are what there was to say while it was written."""

    batches: Sequence[pyarrow.RecordBatch]
    notes: tuple[str, ...]


def cache_key(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a content that JSON can write."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find(key: str) -> Mapped | None:
    """Return the file of a key, and mark it as used today; None where there is none that is as it was written."""
    path = _folder() / f"{key}{SUFFIX}"
    try:
        with path.open("rb") as file:
            if not _sealed(file):
                log.warning("%s is damaged and is made again", path)
                return None
        os.utime(path)
    except OSError:
        return None
    return _mapped(path)


def write(
    key: str | None,
    schema: pyarrow.Schema,
    batches: Iterable[pyarrow.RecordBatch],
    notes: Sequence[str] = (),
    valid: Callable[[], bool] = lambda: True,
) -> Mapped:
    """Write batches as they come, keep the file under its key where that is wanted, and map it.

    `notes` are read when the batches have ended. It is not kept without a key, when it is small, or when `valid` then
    says that the key no longer fits. Errors of the batches pass through, and leave nothing behind.

    Raises:
        ResourceError: the cache has no room.
    """
    import pyarrow

    folder = _folder()
    with _partial(folder, key or "unnamed") as (path, file):
        with failures_told(folder, REFUSED):
            writer = pyarrow.ipc.new_file(pyarrow.PythonFile(file, mode="w"), schema)
        for batch in batches:
            with failures_told(folder, REFUSED):
                writer.write_batch(batch)
        with failures_told(folder, REFUSED):
            writer.close()
            _seal(file, notes)
        made = _mapped(path)
        if key is not None and file.tell() >= KEPT_BYTES and valid():
            with failures_told(folder, REFUSED):
                path.replace(folder / f"{key}{SUFFIX}")
        return made


def _folder() -> Path:
    return default_cache() / FOLDER


@contextmanager
def _partial(folder: Path, name: str) -> Iterator[tuple[Path, BufferedRandom]]:
    """Open a file under a name that tells which process writes it, and remove it unless it has got another one."""
    with failures_told(folder, REFUSED):
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        path = folder / f".{name}-{secrets.token_hex(4)}.{os.getpid()}{PARTIAL}"
        file = path.open("x+b")
    try:
        with file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            yield path, file
    finally:
        path.unlink(missing_ok=True)


def _sweep(folder: Path) -> None:
    """Remove partial files whose process is no more, be it of this machine or of another that shares the folder."""
    for path in folder.glob(f".*{PARTIAL}"):
        number = path.name.removesuffix(PARTIAL).rpartition(".")[2]
        if number.isdecimal() and not _alive(int(number)):
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def _alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _seal(file: BufferedRandom, notes: Sequence[str]) -> None:
    """Write what follows the Arrow data, and bring the whole file to the disk."""
    said = json.dumps(list(notes)).encode()
    file.write(said + len(said).to_bytes(LENGTH, "little"))
    file.flush()
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256")
    file.seek(0, os.SEEK_END)
    file.write(digest.digest())
    file.flush()
    os.fsync(file.fileno())


def _sealed(file: BinaryIO) -> bool:
    left = os.fstat(file.fileno()).st_size - SEAL
    digest = hashlib.sha256()
    while left > 0 and (part := file.read(min(left, CHUNK))):
        digest.update(part)
        left -= len(part)
    return file.read() == digest.digest()


def _mapped(path: Path) -> Mapped:
    import pyarrow

    buffer = pyarrow.memory_map(str(path)).read_buffer()
    end = len(buffer) - SEAL - LENGTH
    length = int.from_bytes(buffer[end : end + LENGTH].to_pybytes(), "little")
    notes = json.loads(buffer[end - length : end].to_pybytes())
    reader = pyarrow.ipc.open_file(pyarrow.BufferReader(buffer[: end - length]))
    return Mapped([reader.get_batch(number) for number in range(reader.num_record_batches)], tuple(notes))
