"""Cores, allocator, GPUs, memory and disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhf.allocator import allocator
from rlhf.doctor.check import Check
from rlhf.installing import engine_command
from rlhf.recipe.main_memory import main_memory
from rlhf.recipe.products import Products, cpu_products

GIB = 2**30
TERA = 10**12
QUICKSTART = 8 * GIB
LEAST_MEMORY = 2 * GIB
SHARED = 1 * GIB
ROOMY_DISK, LEAST_DISK = 10 * GIB, 1 * GIB


def thread_check(environ: Mapping[str, str], cores: int, quota: float | None) -> Check:
    """Compare OMP_NUM_THREADS and the cores that are visible with those that may be used (`quota`, None: all)."""
    usable = min(cores, quota) if quota else cores
    limit = f", limited to {quota:g} by the container" if quota and quota < cores else ""
    found = f"{cores} cores{limit}, OMP_NUM_THREADS {environ.get('OMP_NUM_THREADS', 'not set')}"
    text = environ.get("OMP_NUM_THREADS", "")
    threads = int(text) if text.isdecimal() else None
    if text and not threads:
        return Check("threads", "warn", found, "set OMP_NUM_THREADS to a whole number, or unset it")
    if threads and threads > usable:
        why = "threads that wait for a core spin and slow the others by ten times"
        return Check("threads", "warn", found, f"export OMP_NUM_THREADS={max(1, int(usable))}: {why}")
    if not threads and quota and quota < cores:
        return Check(
            "threads", "warn", found, f"export OMP_NUM_THREADS={max(1, int(quota))}: libraries count all cores"
        )
    return Check("threads", "ok", found)


def allocator_check(environ: Mapping[str, str], huge_pages: str) -> Check:
    """Say whether training on CPU in this process gets a fast allocator; `huge_pages` is the kernel's setting."""
    preloaded = next(
        (name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in environ.get("LD_PRELOAD", "")), ""
    )
    if preloaded:
        return Check("allocator", "ok", f"{preloaded} is preloaded")
    if "hugetlb" in environ.get("GLIBC_TUNABLES", ""):
        if "[never]" in huge_pages:
            return Check(
                "allocator", "warn", "huge pages are off in the kernel", "preload tcmalloc instead (LD_PRELOAD)"
            )
        return Check("allocator", "ok", "glibc with huge pages")
    found = "glibc's defaults; roles on Ray get a faster one from us, --local trains about a quarter slower on CPU"
    settings = " ".join(f"{name}={value}" for name, value in allocator(environ).items())
    return Check("allocator", "warn", found, f"export {settings}")


def gpu_check(environ: Mapping[str, str], driver: str, cuda: str, seen: int) -> Check:
    """Compare the GPUs of the driver (`driver`: a line of nvidia-smi each) with those that torch's build sees."""
    cards = driver.splitlines()
    hidden = environ.get("CUDA_VISIBLE_DEVICES")
    shown = f"; CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else ""
    first = f" ({cards[0]})" if cards else ""
    build = f"CUDA {cuda}" if cuda else "CPU"
    found = f"{len(cards)} by the driver{first}, torch for {build} sees {seen}{shown}"
    if not cards and cuda:
        return Check("gpus", "warn", found, f"no NVIDIA driver here; smaller and faster: {engine_command('cpu')}")
    if not cards:
        return Check("gpus", "ok", f"none; {found}" if shown else "none, torch for CPU")
    if not cuda:
        return Check("gpus", "warn", found, f"this torch cannot use the GPUs: {engine_command('gpu')}")
    if not seen:
        remedy = "unset CUDA_VISIBLE_DEVICES" if hidden is not None else f"update the driver to one for CUDA {cuda}"
        return Check("gpus", "fail", found, remedy)
    if seen < len(cards):
        return Check("gpus", "warn", found, "CUDA_VISIBLE_DEVICES hides some" if shown else "see nvidia-smi")
    return Check("gpus", "ok", found)


def dtype_check(products: Products, gpus: int) -> Check:
    """Say what `model.dtype: auto` is on this machine's CPU; a slow bfloat16 matters less where there are GPUs."""
    rates = f"{products.bfloat16 / TERA:.2g} TFLOP/s in bfloat16, {products.float32 / TERA:.2g} in float32"
    if products.faster == "bfloat16":
        return Check("dtype", "ok", f"the CPU multiplies at {rates}; model.dtype: auto is bfloat16 on it")
    slow = f"bfloat16 is {products.slower:.2g} times slower than float32 on this CPU ({rates})"
    if gpus:
        return Check("dtype", "ok", f"{slow}; model.dtype: auto follows the devices of the roles")
    return Check("dtype", "warn", slow, "leave model.dtype at auto, which is float32 here: bfloat16 costs that much")


def memory_check(total: int, limit: int | None, available: int) -> Check:
    """Check main memory in bytes: the machine's, the container's limit if it has one, and what is free now."""
    usable = min(available, limit or available)
    bound = f", limited to {limit / GIB:.1f} GiB by the container" if limit and limit < total else ""
    found = f"{total / GIB:.1f} GiB{bound}, {usable / GIB:.1f} GiB free"
    if usable < LEAST_MEMORY:
        return Check("memory", "fail", found, f"free some: not even a tiny model runs in {usable / GIB:.1f} GiB")
    if usable < QUICKSTART:
        return Check(
            "memory", "warn", found, "the quickstart wants about 8 GiB; `rlhf plan RECIPE` says what yours wants"
        )
    return Check("memory", "ok", found)


def shared_memory_check(size: int | None) -> Check:
    """Check /dev/shm in bytes (None: there is none), through which Ray passes objects and weights reach the engine."""
    if size is None or size < SHARED:
        found = "no /dev/shm" if size is None else f"/dev/shm has {size / GIB:.2f} GiB"
        return Check("shared memory", "warn", found, "start the container with --shm-size=8g: weights pass through it")
    return Check("shared memory", "ok", f"/dev/shm has {size / GIB:.1f} GiB")


def folder_check(name: str, folder: Path) -> Check:
    """Check that a folder, or the one it would be made in, can be written and has room."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        return Check(name, "fail", f"{there} is no folder", "choose another one")
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"doctor")
    except OSError as error:
        return Check(name, "fail", f"{there} cannot be written: {error.strerror}", "choose another one, or its rights")
    free = shutil.disk_usage(there).free
    found = f"{there}: {free / GIB:.1f} GiB free"
    if free < LEAST_DISK:
        return Check(name, "fail", found, "free some space: checkpoints of even small models do not fit")
    if free < ROOMY_DISK:
        return Check(
            name, "warn", found, "checkpoints hold weights and optimizers; lower recovery.keep_last, or free some"
        )
    return Check(name, "ok", found)


def check_hardware(output: Path, cache: Path, cuda: str, seen: int) -> Iterator[Check]:
    """Check this machine; `cuda` and `seen` are what torch says of its build and GPUs."""
    memory = main_memory()
    shm = Path("/dev/shm")
    yield thread_check(os.environ, len(os.sched_getaffinity(0)), _cpu_quota())
    yield allocator_check(os.environ, _text("/sys/kernel/mm/transparent_hugepage/enabled"))
    yield gpu_check(os.environ, _driver(), cuda, seen)
    yield dtype_check(cpu_products(), seen)
    yield memory_check(memory.total, memory.limit, memory.free)
    yield shared_memory_check(shutil.disk_usage(shm).total if shm.is_dir() else None)
    yield folder_check("run folder", output)
    yield folder_check("cache", cache)


def _driver() -> str:
    """Return a line for each GPU of the NVIDIA driver, nothing without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError):
        return ""


def _cpu_quota() -> float | None:
    """Return the cores that the container's quota allows, None for no quota."""
    quota, _, period = _text("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota, period = (_text(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() and int(period) else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
