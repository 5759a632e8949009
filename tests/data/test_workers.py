"""Rows in processes of their own: in order, with the first error of the file, and with nothing left behind."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from byte_tokenizer import ByteTokenizer
from worker_jobs import broken, killed, where

from rlhf.data import workers
from rlhf.data.tokenized import Encoder, tokenized_pairs
from rlhf.data.workers import in_parts, worked
from rlhf.errors import DataError, ResourceError
from rlhf.recipe.base import PathData


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts of a few rows, two processes from the second part on."""
    monkeypatch.setattr(workers, "HERE", 1)
    monkeypatch.setattr(workers, "CHARACTERS", 40)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def numbers(count: int, bad: int | None = None):
    for number in range(count):
        if number == bad:
            raise DataError(f"reading {number}")
        yield number


def test_results_come_in_order_from_other_processes():
    found = [row for part in worked(partial(where, bad=-1), in_parts(numbers(300), lambda _: 10)) for row in part]
    assert [number for number, _ in found] == list(range(300))
    processes = {process for _, process in found}
    assert os.getpid() in processes
    assert len(processes) > 1


@pytest.mark.parametrize(
    ("bad_work", "bad_read", "first"),
    [(70, None, "row 70"), (70, 72, "row 70"), (70, 71, "row 70"), (73, 70, "reading 70"), (2, 70, "row 2")],
)
def test_the_first_error_in_the_order_of_rows_is_raised(bad_work, bad_read, first):
    parts = in_parts(numbers(300, bad_read), lambda _: 10)
    with pytest.raises(DataError) as error:
        list(worked(partial(where, bad=bad_work), parts))
    assert str(error.value) == first


def test_a_process_that_dies_is_a_clear_error():
    with pytest.raises(ResourceError, match="a process that tokenises has ended before its work was done"):
        list(worked(killed, in_parts(numbers(300), lambda _: 10)))


def test_a_mistake_in_the_work_is_told():
    with pytest.raises(RuntimeError, match="in a process that tokenises: ZeroDivisionError"):
        list(worked(broken, in_parts(numbers(300), lambda _: 10)))


def test_work_that_cannot_be_sent_is_done_here():
    parts = in_parts(numbers(100), lambda _: 10)
    found = [row for part in worked(lambda rows: [(row, os.getpid()) for row in rows], parts) for row in part]
    assert {process for _, process in found} == {os.getpid()}


def test_processes_end_with_the_caller():
    rows = worked(partial(where, bad=-1), in_parts(numbers(10**6), lambda _: 10))
    other = next(process for part in rows for _, process in part if process != os.getpid())
    rows.close()
    assert not Path(f"/proc/{other}").exists()


def test_a_row_of_a_file_is_named_as_without_processes(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"Why {n}?", "chosen": "yes", "rejected": "no"} for n in range(60)]
    rows[41]["chosen"] = "much too long " * 9
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"a\.jsonl:42: prompt \+ chosen has \d+ tokens, the limit is 100"):
        tokenized_pairs(PathData(path=path), Encoder(ByteTokenizer(), 100))


UNGUARDED = """
import os
from rlhf.data import workers
print("the script runs")
workers.HERE = 0
os.sched_getaffinity = lambda _: {0, 1}
print(list(workers.worked(len, [[1, 2], [3]])))
"""


def test_a_script_without_a_guard_is_not_run_again(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    result = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["the script runs", "[2, 1]"]
