"""What a folder must hold: size and sha256 of every file, and the manifest that keeps them beside a saved state."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypedDict

from rlhf.errors import ResourceError, TrainingError

MANIFEST = "manifest.json"
FORMAT = 1
FIELDS = {"format": int, "step": int, "key": str, "info": dict, "files": dict}
SEALED = {"model": "files", "adapter": "adapter"}
"""Folders that a finished stage leaves, and the keys of `done.json` that hold the seals of their files."""

MOST_READERS = 8
DAMAGE = (errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENOTDIR, errno.EBADMSG, errno.EUCLEAN)  # not of the reader


class Seal(TypedDict):
    """Size in bytes and hexadecimal sha256 of one file."""

    size: int
    sha256: str


class DamagedManifest(Exception):
    """A manifest is missing, unreadable or not as it was written; the message says which, for people."""


def seal(folder: Path, known: Mapping[str, Seal] | None = None) -> dict[str, Seal]:
    """Flush every file and folder below `folder` to disk and return the seals of its files by relative path.

    Files in `known` were sealed and flushed by the processes that wrote them: they must be there in the sealed size,
    and are not read again. Raises OSError when a file cannot be read or flushed, and TrainingError when a known file is
    not as it was sealed, or for a symbolic link or a device: what it shows could change without the folder changing.
    """
    files, folders, odd = _contents(folder)
    if odd:
        name, what = next(iter(odd.items()))
        raise TrainingError(f"{folder / name}: {what}; only plain files and folders can be kept")
    seals = {name: _confirmed(folder, name, given, files.get(name)) for name, given in (known or {}).items()}
    unread = {name: path for name, path in files.items() if name not in seals}
    with _readers(len(unread)) as pool:
        seals |= zip(unread, pool.map(seal_file, unread.values()), strict=True)
    for below in (*folders, folder):
        flush_folder(below)
    return {name: seals[name] for name in files}


def seal_file(path: Path) -> Seal:
    """Flush one file to disk and return its seal."""
    return _read(path, flush=True)


def broken(folder: Path, sealed: Mapping[str, Any]) -> list[str]:
    """Return every difference between the files of `folder` and their seals of `seal`, in words; empty when whole.

    What is sealed must be there as it was; other files beside it (notes, links, an operating system's own) do not
    matter and are not looked at. Symbolic links are not followed, nor is any path that leaves the folder. Raises
    ResourceError when this process may not read a sealed file, or not now.
    """
    if folder.is_symlink() or not folder.is_dir():
        return [".: not a folder"]
    names = sorted(sealed)
    with _readers(len(names)) as pool:
        verdicts = pool.map(lambda name: _difference(folder, name, sealed[name]), names)
        return [f"{shown(name)}: {wrong}" for name, wrong in zip(names, verdicts, strict=True) if wrong]


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `content` (step, key, info, files; JSON values only) to the folder's manifest and flush both."""
    body = {"format": FORMAT, **content}
    text = _rendered({**body, "sha256": _digest(body)})
    with open(folder / MANIFEST, "x", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    flush_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of the folder's manifest, every byte of it checked.

    Raises DamagedManifest, or ResourceError when it cannot be read now.
    """
    try:
        with open(folder / MANIFEST, "rb", opener=_open_plain) as file:
            data = file.read()
    except FileNotFoundError:
        raise DamagedManifest(f"{MANIFEST}: missing") from None
    except OSError as error:
        raise DamagedManifest(f"{MANIFEST}: {_unreadable(folder / MANIFEST, error)}") from None
    try:
        whole = json.loads(data)
        body = {name: value for name, value in whole.items() if name != "sha256"}
        intact = whole.get("sha256") == _digest(body) and _rendered(whole).encode("ascii") == data
    except (ValueError, AttributeError, RecursionError):
        raise DamagedManifest(f"{MANIFEST}: truncated or damaged") from None
    if not intact:
        raise DamagedManifest(f"{MANIFEST}: changed since it was written")
    if body.get("format") != FORMAT:
        raise DamagedManifest(f"{MANIFEST}: format {body.get('format')!r}, this version reads {FORMAT}")
    for name, kind in FIELDS.items():
        if not isinstance(body.get(name), kind):
            raise DamagedManifest(f"{MANIFEST}: {name} is missing or of another type")
    return body


def plain_files(folder: Path) -> list[str]:
    """Return the relative paths of the plain files below a folder; links and what is behind them are not among them."""
    return sorted(_contents(folder)[0])


def flush_folder(folder: Path) -> None:
    """Make the entries of a folder durable, where its file system can do that."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def shown(name: str) -> str:
    """Return a file's name fit for a terminal."""
    return name if name.isprintable() else ascii(name)


def _contents(folder: Path) -> tuple[dict[str, Path], list[Path], dict[str, str]]:
    """Return the plain files by relative path, the folders deepest first, and what is neither, in words."""
    files: dict[str, Path] = {}
    folders: list[Path] = []
    odd: dict[str, str] = {}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                path = Path(entry.path)
                name = path.relative_to(folder).as_posix()
                if entry.is_symlink():
                    odd[name] = "a symbolic link"
                elif entry.is_dir():
                    folders.append(path)
                    waiting.append(path)
                elif entry.is_file():
                    files[name] = path
                else:
                    odd[name] = "neither file nor folder"
    return files, sorted(folders, key=lambda path: -len(path.parts)), odd


def _difference(folder: Path, name: str, sealed: Any) -> str:
    """Return what is wrong with one file, "" when it is as it was sealed."""
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or "\0" in name:
        return "the path leaves the folder"
    if not isinstance(sealed, Mapping) or not isinstance(sealed.get("size"), int):
        return "sealed with neither size nor sha256"
    path = folder / name
    try:
        if any(parent.is_symlink() for parent in path.parents if parent != folder and folder in parent.parents):
            return "behind a symbolic link"
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            return "a symbolic link" if stat.S_ISLNK(found.st_mode) else "not a file"
        if found.st_size != sealed["size"]:
            short = found.st_size < sealed["size"]
            return f"{'truncated' if short else 'grown'}: {found.st_size} of {sealed['size']} bytes"
        return "" if _read(path, flush=False) == sealed else "changed"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError as error:
        return _unreadable(path, error)


def _unreadable(path: Path, error: OSError) -> str:
    """Return in words how a file is damaged; raise ResourceError when it may be whole and only cannot be read now."""
    if error.errno in DAMAGE:
        return f"cannot be read: {error.strerror}"
    raise ResourceError(
        f"{path}: cannot be read: {error.strerror}; mend that and run again, nothing is lost"
    ) from error


def _confirmed(folder: Path, name: str, given: Seal, path: Path | None) -> Seal:
    """Return the seal of a file that another process wrote, once the file is there in its size."""
    size = path.lstat().st_size if path else None
    if size != given["size"]:
        seen = "it is not there" if size is None else f"it has {size} here; does this machine see the same disk?"
        raise TrainingError(f"{folder / name}: its writer left {given['size']} bytes, and {seen}")
    return given


def _read(path: Path, flush: bool) -> Seal:
    with open(path, "rb", buffering=0, opener=_open_plain) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
        return {"size": file.tell(), "sha256": sha256}


def _open_plain(path: str, flags: int) -> int:
    """Open a file without following a symbolic link or waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _readers(files: int) -> ThreadPoolExecutor:
    """Threads that hash side by side: hashlib lets go of the interpreter's lock."""
    return ThreadPoolExecutor(max(1, min(files, MOST_READERS, len(os.sched_getaffinity(0)))))


def _rendered(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_rendered(content).encode("ascii")).hexdigest()
