"""Several processes score side by side: the order, the first failure and the end are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import RecipeError, TrainingError
from rlhf.recipe.base import FunctionJudge
from rlhf.rewards.function import FunctionReward
from rlhf.types import Prompt

PROMPTS = [Prompt(f"{n}", (1,), str(n)) for n in range(24)]
TEXTS = [str(n) for n in range(24)]
MEETING = """\
import os, time
from pathlib import Path

def score(prompt, response, metadata):
    room = Path(__file__).parent / "room"
    (room / str(os.getpid())).touch()
    while len(list(room.iterdir())) < {together}:
        time.sleep(0.01)
    return int(response)
"""
FAILING = """\
import os, time

def score(prompt, response, metadata):
    number = int(response)
    if number == 5:
        time.sleep(0.2)
        raise ValueError("five")
    if number == 6:
        raise ValueError("six")
    if number == 7:
        os._exit(3)
    return number
"""


def reward(folder: Path, source: str, workers: int, **settings: float) -> FunctionReward:
    (folder / "mine.py").write_text(source)
    return FunctionReward(f"{folder}/mine.py:score", workers=workers, **settings)


def pids(made: FunctionReward) -> list[int]:
    return [process.process.pid for process in made.processes if process is not None]


def test_processes_score_at_the_same_time_and_the_order_stays(tmp_path):
    """No response is scored before each process has one: with fewer at work this would never end."""
    (tmp_path / "room").mkdir()
    made = reward(tmp_path, MEETING.format(together=4), 4)
    assert made.score_texts(PROMPTS, TEXTS) == [float(n) for n in range(24)]
    assert {int(file.name) for file in (tmp_path / "room").iterdir()} == set(pids(made))
    assert len(set(pids(made))) == 4


def test_processes_start_when_there_is_work_for_them_and_stay(tmp_path):
    made = reward(tmp_path, "def score(p, r, m):\n    return 1\n", 4)
    assert len(pids(made)) == 1
    assert made.score_texts(PROMPTS[:2], TEXTS[:2]) == [1.0, 1.0]
    assert len(pids(made)) == 2
    made.score_texts(PROMPTS, TEXTS)
    before = pids(made)
    assert made.score_texts(PROMPTS, TEXTS) == [1.0] * 24
    assert pids(made) == before
    assert len(before) == 4
    assert made.score_texts([], []) == []


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_the_first_failure_in_order_is_the_one_that_is_told(tmp_path, workers):
    """Response 6 and the end of the process at 7 come sooner where several are at work."""
    made = reward(tmp_path, FAILING, workers)
    for _ in range(2):
        with pytest.raises(TrainingError) as error:
            made.score_texts(PROMPTS, TEXTS)
        assert str(error.value) == f"{tmp_path}/mine.py:7: score() raised ValueError: five (prompt id 5)"
    assert made.score_texts(PROMPTS[8:], TEXTS[8:]) == [float(n) for n in range(8, 24)]


def test_a_failure_ends_the_scoring_of_what_comes_after_it(tmp_path):
    log = tmp_path / "log"
    source = f"def score(p, r, m):\n    open({str(log)!r}, 'a').write('x')\n    raise ValueError(r)\n"
    with pytest.raises(TrainingError, match=r"ValueError: 0 \(prompt id 0\)"):
        reward(tmp_path, source, 3).score_texts(PROMPTS, TEXTS)
    assert 1 <= len(log.read_text()) <= 3


def test_a_process_that_cannot_be_imported_any_more_is_named(tmp_path):
    made = reward(tmp_path, "def score(p, r, m):\n    return 1\n", 2)
    (tmp_path / "mine.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(RecipeError, match=r"mine.py:1: cannot be imported: ModuleNotFoundError"):
        made.score_texts(PROMPTS, TEXTS)


def test_a_hang_in_one_process_names_its_prompt_and_line(tmp_path):
    source = "import time\ndef score(p, r, m):\n    if r == '9':\n        time.sleep(600)\n    return 1\n"
    made = reward(tmp_path, source, 3, timeout_s=3.0)
    with pytest.raises(TrainingError, match=r"mine.py:4: score\(\) did not return within 3 s \(prompt id 9\)"):
        made.score_texts(PROMPTS, TEXTS)
    assert made.score_texts(PROMPTS[10:], TEXTS[10:]) == [1.0] * 14


def test_all_processes_end_with_who_holds_them_and_with_the_parent(tmp_path):
    (tmp_path / "mine.py").write_text("def score(p, r, m):\n    return 1\n")
    code = (
        "import os, sys\n"
        "from rlhf.rewards.function import FunctionReward\n"
        "from rlhf.types import Prompt\n"
        "reward = FunctionReward(sys.argv[1], workers=3)\n"
        "reward.score_texts([Prompt('1', (1,), '')] * 9, [''] * 9)\n"
        "print(*(process.process.pid for process in reward.processes), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"{tmp_path}/mine.py:score"], stdout=subprocess.PIPE, check=False
    )
    left = [int(pid) for pid in done.stdout.split()]
    assert len(left) == 3
    assert all(_gone(pid) for pid in left)
    made = FunctionReward(f"{tmp_path}/mine.py:score", workers=3)
    made.score_texts(PROMPTS, TEXTS)
    left = pids(made)
    del made
    assert all(_gone(pid) for pid in left)


def _gone(pid: int) -> bool:
    """Wait until a process has ended; a zombie has."""
    try:
        while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            os.sched_yield()
    except (FileNotFoundError, ProcessLookupError):
        pass
    return True


def test_the_recipe_has_one_process_unless_it_asks_for_more():
    judge = FunctionJudge(kind="function", path="mine.py:score")
    assert (judge.workers, judge.load_timeout_s) == (1, 120.0)
