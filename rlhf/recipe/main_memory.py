"""The main memory of this machine, as far as a container or a control group lets this process use it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class MainMemory:
    """Bytes: what the machine has, the narrowest limit on this process (None: there is none), and what is free now."""

    total: int
    limit: int | None
    free: int

    @property
    def usable(self) -> int:
        """The most that this process and its children may ever have."""
        return min(self.total, self.limit or self.total)


def main_memory(groups: Path = GROUPS, membership: Path = MEMBERSHIP) -> MainMemory:
    """Ask the kernel; `groups` and `membership` are where it shows control groups. File caches count as free."""
    import psutil

    memory = psutil.virtual_memory()
    limit, free = None, memory.available
    for folder in _groups(groups, membership):
        most = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if most is None or most >= memory.total:
            continue
        limit = min(most, limit or most)
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        free = min(free, max(0, most - max(0, used - _file_cache(folder))))
    return MainMemory(memory.total, limit, free)


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """Yield this process's control group and those around it, of version 2 and of version 1's memory controller."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "memory" if controllers else root
        inner = base / place.strip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder == base or base in folder.parents)


def _file_cache(folder: Path) -> int:
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
