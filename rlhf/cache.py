"""The user's cache: where it is, and what in it is in use."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from rlhf.errors import ResourceError

PRUNED_S = 10.0
"""Pruning holds the lock of an entry only while it renames it."""

_held: dict[Path, int] = {}


def default_cache() -> Path:
    """Return the cache root: `RLHF_CACHE` where it is set, else `~/.cache/rlhf`."""
    return Path(os.environ.get("RLHF_CACHE") or "~/.cache/rlhf").expanduser()


def hold(entry: Path) -> bool:
    """Keep an entry of the cache from being pruned while this process lives, and note that it was used now.

    Return False where there is no such entry (any more). Where the cache cannot be written, nothing can be pruned.

    Raises:
        ResourceError: another process prunes this entry for longer than `PRUNED_S`.
    """
    with suppress(OSError):
        os.utime(entry, follow_symlinks=False)
    ends = time.monotonic() + PRUNED_S
    while os.path.lexists(entry):
        if entry in _held:
            return True
        try:
            handle = os.open(use_lock(entry), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError:
            return True
        if _shared(handle, use_lock(entry)):
            _held[entry] = handle
            continue
        os.close(handle)
        if time.monotonic() > ends:
            raise ResourceError(f"{entry} is being removed by another process: wait for its end, then run again")
        time.sleep(0.05)
    if entry in _held:
        os.close(_held.pop(entry))
    return False


def use_lock(entry: Path) -> Path:
    """Return the file that processes lock, shared, while they use an entry, and pruning, alone, while it renames it."""
    return entry.with_name(f".{entry.name}.use")


def _shared(handle: int, path: Path) -> bool:
    """Lock an open file for use; False where pruning has it, or has removed it meanwhile."""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return True  # a file system without locks
