"""What bounds the memory of processes that compute on a CPU, set by their environment before they start."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

JEMALLOC = (
    "thp:always,metadata_thp:auto,dirty_decay_ms:10000,muzzy_decay_ms:0,background_thread:true,"
    "oversize_threshold:0,narenas:1"
)
"""Options of jemalloc(3): huge pages; what a step frees is kept for the next step, and what is not used again for ten
seconds goes back to the kernel, also while the process waits; all of it is in one place, large blocks too."""

GLIBC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "1000000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
"""How many compiled matrix products oneDNN, and torch before it, keep in a process, in place of 1,024 each.

Every number of rows has products of its own, and packed batches hardly ever have the same number twice: 100 passes over
4 layers keep 160 MiB more with 1,024 than with 32, and no pass is slower. One pass needs about 60.
"""


def kernels(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that bound what compiled matrix products take; what `environ` sets already stays."""
    return {name: environ.get(name, count) for name, count in KERNELS.items()}


def give_back() -> None:
    """Return free memory to the kernel where glibc keeps it (malloc_trim(3)): after work that is not done again soon.

    What large arrays leave stays in a process otherwise; another allocator decides by itself.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def allocator(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that give a process an allocator with huge pages that keeps what a step frees for the next.

    jemalloc as Ray brings it, where it is there; glibc otherwise, which often cannot use a freed tensor's place for the
    next tensor of that size (it looks for 64 bytes more, to align it), and so takes new pages in every step. What
    `environ` preloads already stays, as the user's choice; where that is no allocator, glibc's settings hold.
    """
    library = None if environ.get("LD_PRELOAD") else _library()
    return {"LD_PRELOAD": str(library), "MALLOC_CONF": JEMALLOC} if library else GLIBC


def _library() -> Path | None:
    """Return Ray's jemalloc; it is built for pages of 4 KiB, which x86-64 has everywhere."""
    ray = find_spec("ray")
    if ray is None or ray.origin is None or platform.machine() != "x86_64":
        return None
    library = Path(ray.origin).parent / "core" / "libjemalloc.so"
    return library if library.is_file() else None
