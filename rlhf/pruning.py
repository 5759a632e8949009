"""What the user's cache holds, and its removal: only names that rlhf gives, never through a symbolic link."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rlhf.cache import use_lock

REMOVED, PARTIAL, USE = ".removed-", ".partial", ".use"
VERDICTS = "verdicts.sqlite"
DAY_S = 86400.0
SETTLED_S = 60.0
"""A temporary file that was written to less than this ago is left alone: its process may be about to lock it."""


@dataclass(frozen=True)
class Kind:
    """A folder of the cache: what its entries are called, and temporaries that no lock guards.

    Others are called `.partial`. Their process keeps them locked while it lives: a file itself, a folder through the
    `.lock` beside it.
    """

    folder: str
    entries: re.Pattern[str]
    unlocked: re.Pattern[str]


KINDS = (
    Kind("models", re.compile(r"[^.].*-[0-9a-f]{12}"), re.compile(r"(?!)")),
    Kind("tokens", re.compile(r"[0-9a-f]{64}(\.\w+)?"), re.compile(r"tmp[a-z0-9_]{8}")),  # as earlier versions did
    Kind("reference", re.compile(r"[0-9a-f]{64}(\.\w+)?"), re.compile(r"\.[0-9a-f]{64}\.\w+\.\d+")),
    Kind("products", re.compile(r"[0-9a-f]{64}\.json"), re.compile(r"(?!)")),
)


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache; `size` in bytes, `used` last at so many seconds since the epoch."""

    kind: str
    path: Path
    size: int
    used: float
    in_use: bool


def entries(cache: Path) -> list[Entry]:
    """Return what is kept, by kind, those used last first; verdicts are one entry. Folders that are links are left out.

    A cache that is not there is empty.
    """
    found = []
    for kind in KINDS:
        paths = [path for path in _children(cache / kind.folder) if kind.entries.fullmatch(path.name)]
        found += [entry for path in paths if (entry := _entry(kind.folder, path))]
    found += [entry for path in [cache / VERDICTS] if (entry := _entry("verdicts", path))]
    return sorted(found, key=lambda entry: (entry.kind, -entry.used, entry.path.name))


def superfluous(found: Sequence[Entry], older_than: float | None, max_bytes: int | None, now: float) -> list[Entry]:
    """Return what pruning removes: entries not used for `older_than` seconds, and of the others those whose last use
    is longest ago until no more than `max_bytes` are left.

    Never what is in use, and never verdicts: they are small, and asking a judge again costs money.
    """
    free = sorted((one for one in found if not one.in_use and one.kind != "verdicts"), key=lambda one: one.used)
    doomed = [one for one in free if older_than is not None and now - one.used >= older_than]
    left = sum(one.size for one in found) - sum(one.size for one in doomed)
    for one in free[len(doomed) :]:
        if max_bytes is None or left <= max_bytes:
            break
        doomed.append(one)
        left -= one.size
    return doomed


def remove(entry: Entry) -> bool:
    """Remove an entry, unless a process uses it or has used it since it was listed; return whether it is gone."""
    with _alone(use_lock(entry.path)) as alone:
        again = _entry(entry.kind, entry.path, probe=False)
        if not alone or again is None or again.used > entry.used:
            return False
        doomed = entry.path.with_name(f"{REMOVED}{entry.path.name}-{secrets.token_hex(4)}")
        entry.path.rename(doomed)
        use_lock(entry.path).unlink(missing_ok=True)
    _delete(doomed)
    return True


def sweep(cache: Path) -> list[Path]:
    """Remove the temporary files and folders that processes have left which are no more, and return them.

    What this process may not read or remove stays.
    """
    swept = []
    for kind in KINDS:
        with suppress(OSError):
            paths = [path for path in _children(cache / kind.folder) if _is_temporary(kind, path)]
            swept += [path for path in paths if _swept(path)]
    return swept


def _is_temporary(kind: Kind, path: Path) -> bool:
    return path.name.startswith(REMOVED) or path.suffix in (PARTIAL, USE) or bool(kind.unlocked.fullmatch(path.name))


def _swept(path: Path) -> bool:
    """Remove a temporary whose process has ended, and return whether it was: its lock tells that, or else a day."""
    with suppress(OSError):
        age = time.time() - path.lstat().st_mtime
        if path.name.startswith(REMOVED) or (path.suffix not in (PARTIAL, USE) and age > DAY_S):
            _delete(path)
            return True
        if path.suffix == USE and os.path.lexists(path.with_name(path.name[1:].removesuffix(USE))):
            return False
        if path.suffix in (PARTIAL, USE) and age > SETTLED_S:
            with _alone(path.with_suffix(".lock") if path.is_dir() else path) as alone:
                if alone:
                    _delete(path)
                return alone
    return False


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Hold a lock file alone for a moment, made where it is not there; give False where another process has it."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        yield _locks(handle)
    finally:
        os.close(handle)


def _locks(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody has it, or the file system has no locks
        return False
    return True


def _children(folder: Path) -> list[Path]:
    """Return what is in a folder that is no link."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(folder.iterdir())


def _entry(kind: str, path: Path, probe: bool = True) -> Entry | None:
    """Describe a path; None where it is neither file nor folder, or gone."""
    try:
        status = path.lstat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return None
        return Entry(kind, path, _size(path), status.st_mtime, probe and _in_use(path))
    except FileNotFoundError:
        return None


def _in_use(path: Path) -> bool:
    if not use_lock(path).exists():
        return False
    with _alone(use_lock(path)) as alone:
        return not alone


def _size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; links count as themselves."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(_size(child) for child in path.iterdir())


def _delete(path: Path) -> None:
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
