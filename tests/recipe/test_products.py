"""Rates of products on the CPU: which instructions count, what is kept, and what a disturbed measurement may change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.recipe import products
from rlhf.recipe.products import Products, bfloat16_instructions, cpu_products, measure

ZEN4 = "processor : 0\nmodel name : AMD EPYC\nflags : fpu avx2 avx512f avx512_bf16\n"
LAPTOP = "processor : 0\nmodel name : Some CPU\nflags : fpu avx2\n"
ARM = "processor : 0\nFeatures : fp asimd bf16\nCPU part : 0xd40\n"
HIDDEN = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


@pytest.mark.parametrize(
    ("cpuinfo", "environ", "has"),
    [
        (ZEN4, {}, True),
        (ARM, {}, True),
        (LAPTOP, {}, False),
        ("", {}, False),
        (ZEN4, HIDDEN, False),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"}, False),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "default"}, True),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": ""}, True),
        (ZEN4, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, False),
    ],
)
def test_instructions_count_where_they_are_and_are_not_hidden(cpuinfo, environ, has):
    assert bfloat16_instructions(cpuinfo, environ) is has


@pytest.mark.parametrize(
    ("bfloat16", "instructions", "faster"),
    [
        (2.0, True, "bfloat16"),
        (0.9, True, "bfloat16"),  # a disturbed measurement
        (0.7, True, "float32"),
        (2.0, False, "bfloat16"),
        (1.2, False, "float32"),  # a disturbed measurement of float32
        (0.02, False, "float32"),
    ],
)
def test_a_clear_measurement_decides_and_else_the_instructions(bfloat16, instructions, faster):
    assert Products(bfloat16 * 1e11, 1e11, instructions).faster == faster


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose measurements are made up, with a cache of its own; returns the rates of each measurement."""
    made: list[dict[str, float]] = []
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(products, "measure", lambda: {"disturbed": 0.0, **made.pop(0)})
    products._rates.cache_clear()
    yield made
    products._rates.cache_clear()


def again() -> Products:
    """Ask as another process does."""
    products._rates.cache_clear()
    return cpu_products()


def kept_file(cache: Path) -> Path:
    (file,) = (cache / "products").iterdir()
    return file


def test_it_measures_once_and_keeps_what_it_found(machine, tmp_path):
    machine += [{"bfloat16": 2.0, "float32": 4.0}]
    first = cpu_products()
    assert (first.bfloat16, first.float32, first.slower) == (2.0, 4.0, 2.0)
    assert again() == cpu_products() == first
    assert (first.rate("bfloat16"), first.rate("float32")) == (2.0, 4.0)


@pytest.mark.parametrize(("disturbed", "bfloat16", "float32"), [(1.0, 3.0, 4.0), (0.0, 3.0, 1.0)])
def test_after_a_day_it_measures_again_and_if_disturbed_keeps_the_faster(
    machine, tmp_path, disturbed, bfloat16, float32
):
    machine += [{"bfloat16": 2.0, "float32": 4.0}, {"bfloat16": 3.0, "float32": 1.0, "disturbed": disturbed}]
    cpu_products()
    file = kept_file(tmp_path / "cache")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"at": time.time() - 2 * products.FRESH_S}))
    found = again()
    assert (found.rate("bfloat16"), found.rate("float32")) == (bfloat16, float32)


def test_a_disturbed_measurement_is_repeated_by_the_next_command(machine):
    machine += [{"bfloat16": 2.0, "float32": 1.0, "disturbed": 1.0}, {"bfloat16": 4.0, "float32": 8.0}]
    assert cpu_products().disturbed
    assert again() == Products(4.0, 8.0, again().instructions)
    assert not machine


@pytest.mark.parametrize(("preempted", "disturbed"), [(0, 0.0), (10_000_000, 1.0)])
def test_a_measurement_is_disturbed_where_other_programs_took_the_cores(monkeypatch, preempted, disturbed):
    counts = iter([5, 5 + preempted])
    monkeypatch.setattr(products, "_preempted", lambda: next(counts))
    assert measure()["disturbed"] == disturbed


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "1", "null", '{"bfloat16": 1}', '{"bfloat16": 0, "float32": 1, "at": 1}',
             '{"bfloat16": NaN, "float32": 1, "at": 1}', '{"bfloat16": "x", "float32": 1, "at": 1}', "[" * 100_000]
)  # fmt: skip
def test_a_damaged_file_is_measured_again(machine, tmp_path, text):
    machine += [{"bfloat16": 2.0, "float32": 4.0}, {"bfloat16": 1.0, "float32": 3.0}]
    cpu_products()
    kept_file(tmp_path / "cache").write_text(text)
    assert again().float32 == 3.0
    assert again().float32 == 3.0


@pytest.mark.parametrize("there", ["a file", "a folder in the file's place"])
def test_a_cache_that_takes_nothing_costs_a_measurement(machine, tmp_path, there):
    machine += [{"bfloat16": 2.0, "float32": 4.0}] * 3
    if there == "a file":
        (tmp_path / "cache").write_text("")
    else:
        cpu_products()
        file = kept_file(tmp_path / "cache")
        file.unlink()
        (file / "inside").mkdir(parents=True)
    assert again().float32 == 4.0
    assert again().float32 == 4.0
    assert len(machine) == (1 if there == "a file" else 0)


@pytest.mark.parametrize("name", ["ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS"])
def test_what_changes_the_rates_has_a_measurement_of_its_own(machine, monkeypatch, name):
    machine += [{"bfloat16": 2.0, "float32": 4.0}, {"bfloat16": 1.0, "float32": 1.0}]
    before = cpu_products()
    monkeypatch.setenv(name, "7")
    assert cpu_products() != before
    monkeypatch.undo()


def test_it_measures_rates_of_both():
    rates = measure()
    assert rates.keys() == {"bfloat16", "float32", "disturbed"}
    assert all(1e6 < rates[dtype] < 1e15 for dtype in ("bfloat16", "float32"))


DECIDES = "from rlhf.recipe.products import cpu_products as p; import json; print(json.dumps([p().faster, p().slower]))"


def decided(tmp_path: Path, **more: str) -> tuple[str, float]:
    """Ask a process of its own."""
    environ = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    ended = subprocess.run(
        [sys.executable, "-c", DECIDES],
        env=environ | {"RLHF_CACHE": str(tmp_path), **more},
        capture_output=True,
        text=True,
        check=True,
    )
    faster, slower = json.loads(ended.stdout)
    return faster, slower


def test_with_hidden_instructions_it_is_float32(tmp_path):
    faster, slower = decided(tmp_path, **HIDDEN)
    assert faster == "float32"
    assert slower > 1 / products.UNAIDED_MARGIN
    file = kept_file(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"disturbed": 0.0}))
    assert decided(tmp_path, **HIDDEN) == (faster, slower)  # what is kept, not another measurement


def test_this_machine_is_what_its_instructions_say(tmp_path):
    has = bfloat16_instructions(Path("/proc/cpuinfo").read_text(), {})
    assert decided(tmp_path)[0] == ("bfloat16" if has else "float32")
