"""The allocator of processes that train: what is set, and that a process gets it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import allocator as module
from rlhf.allocator import GLIBC, KERNELS, allocator, kernels

GROWTH = """
import resource, torch

def step():
    kept = [torch.ones(2**19), torch.ones(1000)]  # the large one goes, small ones around it stay
    return kept[1], [torch.ones(1000) for _ in range(8)]

held = [step() for _ in range(8)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
held += [step() for _ in range(64)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
print(any("jemalloc" in line for line in open("/proc/self/maps")))
"""


def test_a_users_choice_stays():
    assert allocator({"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}) == GLIBC


def test_jemalloc_where_ray_brings_it_and_glibc_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    ray = tmp_path / "ray" / "__init__.py"
    monkeypatch.setattr(module, "find_spec", lambda name: type("Spec", (), {"origin": str(ray)}))
    assert allocator({}) == GLIBC
    library = tmp_path / "ray" / "core" / "libjemalloc.so"
    library.parent.mkdir(parents=True)
    library.touch()
    assert allocator({})["LD_PRELOAD"] == str(library)
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert allocator({}) == GLIBC


@pytest.mark.skipif("LD_PRELOAD" not in allocator({}), reason="Ray brings no jemalloc for this machine")
def test_a_process_runs_on_it_and_uses_freed_memory_again():
    settings = allocator({})
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | settings
    ended = subprocess.run([sys.executable, "-c", GROWTH], env=environment, capture_output=True, text=True, check=True)
    grown_kib, loaded = ended.stdout.split()
    assert loaded == "True"
    assert int(grown_kib) < 64 * 1024  # of 128 MiB taken and freed
    assert Path(settings["LD_PRELOAD"]).is_file()
    assert "jemalloc" not in ended.stderr  # it says there what it does not understand of MALLOC_CONF


HEAP = """
import numpy
from rlhf.allocator import give_back
def kept():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
before = kept()
blocks = [numpy.ones(100 << 10, numpy.uint8) for _ in range(1024)]  # below glibc's threshold for maps of their own
last = numpy.ones(100 << 10, numpy.uint8)  # keeps the heap's end where it is
del blocks
print(kept() - before)
give_back()
print(kept() - before)
"""


def test_free_memory_goes_back_to_the_kernel():
    environ = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", *GLIBC)}
    ended = subprocess.run([sys.executable, "-c", HEAP], env=environ, capture_output=True, text=True, check=True)
    before, after = map(int, ended.stdout.split())
    assert before > 90 * 1024
    assert after < 20 * 1024


SHAPES = """
import torch
torch.set_num_threads(1)
def kept():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
weights = [torch.randn(256, 256).bfloat16() for _ in range(4)]
before = kept()
for rows in range(1, 161):
    for weight in weights:
        torch.nn.functional.linear(torch.randn(rows, 256, dtype=torch.bfloat16), weight)
print(kept() - before)
"""


def test_what_compiled_products_keep_is_bounded():
    """160 numbers of rows, each with kernels of its own where bfloat16 products are compiled: 110 MiB of them."""
    environ = {name: value for name, value in os.environ.items() if name not in KERNELS}
    grown = [
        int(subprocess.run([sys.executable, "-c", SHAPES], env=environ | more, capture_output=True, check=True).stdout)
        for more in ({}, dict.fromkeys(KERNELS, "16"))
    ]
    if grown[0] < 32 * 1024:
        pytest.skip("this CPU compiles no bfloat16 products")
    assert grown[1] < grown[0] / 2


def test_bounds_that_the_user_has_set_stay():
    assert kernels({}) == KERNELS
    assert kernels({"LRU_CACHE_CAPACITY": "7"}) == {**KERNELS, "LRU_CACHE_CAPACITY": "7"}
