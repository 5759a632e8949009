"""The rows of `tests.benchmarks.scale` at small sizes: memory grows no faster than the data."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.benchmarks._rows import Row, rows

FEW, TIMES, MOST = 400, 4, 5
"""Memory for `TIMES` as much data is at most `MOST` times as large; were it their square, it would be 16 times."""

CHECK = "def score(prompt, response, metadata):\n    return 1.0\n"


def peak(row: Row, size: int, folder: Path) -> int:
    folder.mkdir()
    work = row.prepare(size, folder)
    gc.collect()
    tracemalloc.start()
    work()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def peaks(name: str, folder: Path) -> list[int]:
    """Return what a row takes for `FEW` items and for `TIMES` as many, at small sizes of everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.report.intervals.CELLS", 1000)
        patch.setattr("rlhf.report.intervals.FLIPS", 20)
        patch.setattr("rlhf.report.runs.write_html", lambda *of, **more: None)  # which holds 200 prompts at most
        patch.setattr("tests.benchmarks._comparison.CANDIDATES", 2)
        patch.setattr("tests.benchmarks._comparison.RESAMPLES", 20)
        patch.setattr("tests.benchmarks._comparison.TOKENS", 20)
        patch.setattr("tests.benchmarks._data.MODEL", "tiny://llama")
        patch.setattr("tests.benchmarks._sampling.TOKENS", 20)
        patch.setattr("tests.benchmarks._sampling.LONG", 20)
        patch.setattr("tests.benchmarks._scores_states.CHECK", CHECK)
        patch.setattr("tests.benchmarks._scores_states.WORKERS", 2)
        patch.setattr("tests.benchmarks._scores_states.MEBI", 1_024)
        row = rows()[name]
        peak(row, 100, folder / "first")  # what is imported and kept on first use
        return [peak(row, size, folder / str(size)) for size in (FEW, TIMES * FEW)]


@pytest.fixture(scope="module")
def process():
    """A process of its own: the threads that other tests leave in this one take memory too."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", list(rows()))
def test_memory_grows_no_faster_than_the_data(process, name, tmp_path):
    few, many = process.submit(peaks, name, tmp_path).result()
    assert many < MOST * few
