"""The rows of `tests.benchmarks.scale` at small sizes: memory grows no faster than the data."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest

from tests.benchmarks._rows import Row, rows

FEW, TIMES, MOST, TRIES = 400, 4, 5, 3
"""Memory for `TIMES` as much data is at most `MOST` times as large; were it their square, it would be 16 times.

What other threads of the process hold meanwhile is counted too, so the bound must hold in one of `TRIES`.
"""

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


@pytest.mark.parametrize("name", list(rows()))
def test_memory_grows_no_faster_than_the_data(name, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.report.intervals.CELLS", 1000)
    monkeypatch.setattr("rlhf.report.intervals.FLIPS", 20)
    monkeypatch.setattr("rlhf.report.runs.write_html", lambda *of, **more: None)  # which holds 200 prompts at most
    monkeypatch.setattr("tests.benchmarks._comparison.CANDIDATES", 2)
    monkeypatch.setattr("tests.benchmarks._comparison.RESAMPLES", 20)
    monkeypatch.setattr("tests.benchmarks._comparison.TOKENS", 20)
    monkeypatch.setattr("tests.benchmarks._data.MODEL", "tiny://llama")
    monkeypatch.setattr("tests.benchmarks._sampling.TOKENS", 20)
    monkeypatch.setattr("tests.benchmarks._sampling.LONG", 20)
    monkeypatch.setattr("tests.benchmarks._scores_states.CHECK", CHECK)
    monkeypatch.setattr("tests.benchmarks._scores_states.WORKERS", 2)
    monkeypatch.setattr("tests.benchmarks._scores_states.MEBI", 1_024)
    row = rows()[name]
    peak(row, 100, tmp_path / "first")  # what is imported and kept on first use
    few, many = (peak(row, size, tmp_path / str(size)) for size in (FEW, TIMES * FEW))
    for again in range(1, TRIES):
        if many < MOST * few:
            break
        many = min(many, peak(row, TIMES * FEW, tmp_path / f"again{again}"))
    assert many < MOST * few
