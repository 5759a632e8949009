"""How fast this machine's CPU multiplies matrices in bfloat16 and in float32: measured once, kept in the cache."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.cache import default_cache
from rlhf.recipe.base import DTYPES, Dtype

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "products"
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "svebf16")
"""Names in /proc/cpuinfo of instructions that multiply bfloat16 numbers, on x86 and on ARM."""
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables that keep oneDNN, which multiplies for torch, from using newer instructions than they name."""
WITH_BFLOAT16 = ("DEFAULT", "ALL", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX10")
"""What their values that allow those of x86 begin with."""
OTHERS = ("ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
MARGIN, UNAIDED_MARGIN = 0.8, 1.5
"""How many times float32's rate bfloat16's must be at least, with such instructions and where none are known.

Bfloat16 takes half the memory, so a draw is enough for it; a disturbed measurement must not overrule what the CPU has.
"""
SIZES, LAPS, BUDGET_S = (256, 512, 1024), 4, 0.2
FRESH_S = 86400.0
"""A measurement is repeated after a day, or at once where other programs disturbed it, and the faster one kept."""
PREEMPTED = 100
"""Times in a second of a thread from which on other programs disturbed it; alone it is a few, beside one other 400."""


@dataclass(frozen=True)
class Products:
    """Floating-point operations per second of matrix products on the CPU.

    `instructions`: it has some for bfloat16. `disturbed`: other programs ran meanwhile, so that the rates are too low.
    """

    bfloat16: float
    float32: float
    instructions: bool
    disturbed: bool = False

    def rate(self, dtype: Dtype) -> float:
        """Return the rate of a dtype."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32

    @property
    def slower(self) -> float:
        """How many times slower bfloat16 is than float32."""
        return self.float32 / self.bfloat16

    @property
    def faster(self) -> Dtype:
        """What models should be held in here."""
        margin = MARGIN if self.instructions else UNAIDED_MARGIN
        return "bfloat16" if self.bfloat16 >= margin * self.float32 else "float32"


def cpu_products() -> Products:
    """Return the rates of this machine, for the threads of this process; measured in under a second where not kept.

    A cache that cannot be read or written costs that time, and nothing else.
    """
    text = _cpuinfo()
    has = bfloat16_instructions(text, os.environ)
    rates = _rates(default_cache() / FOLDER / f"{_key(text)}.json")
    return Products(rates["bfloat16"], rates["float32"], has, bool(rates["disturbed"]))


def bfloat16_instructions(cpuinfo: str, environ: Mapping[str, str]) -> bool:
    """Return whether the CPU has instructions for bfloat16, and the environment does not hide them from oneDNN."""
    limits = [environ[name].upper() for name in LIMITS if environ.get(name)]
    hidden = any(not limit.startswith(WITH_BFLOAT16) for limit in limits)
    return not hidden and any(name in _flags(cpuinfo) for name in INSTRUCTIONS)


@cache
def _rates(file: Path) -> dict[str, float]:
    kept = _read(file)
    if kept is not None and 0 <= time.time() - kept["at"] < FRESH_S and not kept["disturbed"]:
        return kept
    found = measure()
    if kept is not None and found["disturbed"]:
        found |= {dtype: max(found[dtype], kept[dtype]) for dtype in DTYPES}
    _write(file, {**found, "at": time.time()})
    return found


def measure() -> dict[str, float]:
    """Return the best rate of each dtype, and by `disturbed` whether other programs took the cores meanwhile.

    What is multiplied are the products of a layer forward and of its gradient backward. The dtypes take turns, so that
    what else the machine does slows both. Each has `BUDGET_S`; where its small products take all of that, larger ones
    are not tried.
    """
    import torch

    best = dict.fromkeys(DTYPES, 0.0)
    spent = dict.fromkeys(DTYPES, 0.0)
    preempted, began = _preempted(), time.perf_counter()
    for size in SIZES:
        pairs = {dtype: torch.randn(2, size, size).to(getattr(torch, dtype)) for dtype in DTYPES}
        for _ in range(LAPS):
            for dtype in DTYPES:
                if spent[dtype] < BUDGET_S:
                    seconds = _seconds(*pairs[dtype])
                    spent[dtype] += seconds
                    best[dtype] = max(best[dtype], 4 * size**3 / seconds)
    usual = PREEMPTED * (time.perf_counter() - began) * torch.get_num_threads()
    rates = {str(dtype): rate for dtype, rate in best.items()}
    return {**rates, "disturbed": float(_preempted() - preempted > usual)}


def _preempted() -> int:
    """Return how often the system took a core from this process's threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _seconds(rows: Tensor, weight: Tensor) -> float:
    from torch.nn.functional import linear

    began = time.perf_counter()
    linear(rows, weight)
    rows.matmul(weight)
    return max(time.perf_counter() - began, 1e-9)


def _key(cpuinfo: str) -> str:
    """Return a digest of all that the rates depend on: CPU, instructions, limits, threads and torch."""
    model = next((value for name, value in _fields(cpuinfo) if name in ("model name", "CPU part")), "")
    given = {name: os.environ.get(name, "") for name in (*LIMITS, *OTHERS)}
    machine = [model, sorted(_flags(cpuinfo)), sorted(given.items()), len(os.sched_getaffinity(0)), version("torch")]
    return hashlib.sha256(json.dumps(machine).encode()).hexdigest()


def _flags(cpuinfo: str) -> set[str]:
    return {flag for name, value in _fields(cpuinfo) if name in ("flags", "Features") for flag in value.split()}


def _fields(cpuinfo: str) -> Iterable[tuple[str, str]]:
    pairs = (line.partition(":") for line in cpuinfo.splitlines())
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def _cpuinfo() -> str:
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return ""


def _read(file: Path) -> dict[str, float] | None:
    """Return what is kept, None where nothing whole is."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = json.loads(file.read_bytes())
        kept = {name: float(found[name]) for name in (*DTYPES, "at", "disturbed")}
        if all(math.isfinite(kept[name]) and kept[name] > 0 for name in (*DTYPES, "at")):
            return kept
    return None


def _write(file: Path, content: dict[str, float]) -> None:
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(file)
