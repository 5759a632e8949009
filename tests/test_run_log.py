"""The logs of a run: bounded, whatever reward functions print, and never a reason to stop."""

import errno
import logging
import os

import pytest

from rlhf import run_log
from rlhf.rewards.function import FunctionReward
from rlhf.run_log import logged
from rlhf.types import Prompt

log = logging.getLogger("rlhf")
CHATTY = """\
def judge(prompt, response, metadata):
    for number in range(2000):
        print("noise", number, "x" * 40)
    return float(len(response))
"""


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(run_log, "BYTES", 4096)


def test_the_newest_stay_and_the_size_is_bounded(tmp_path, small):
    with logged(tmp_path):
        for number in range(1000):
            log.info("message %d", number)
    files = sorted((tmp_path / "logs").glob("run.log*"))
    assert [file.name for file in files] == ["run.log", "run.log.1", "run.log.2", "run.log.3"]
    assert all(file.stat().st_size <= 4096 for file in files)
    assert files[0].read_text().splitlines()[-1].endswith("message 999")


def test_a_log_of_another_process_is_continued(tmp_path):
    for number in (1, 2):
        with logged(tmp_path):
            log.info("message %d", number)
    assert len((tmp_path / "logs" / "run.log").read_text().splitlines()) == 2


def test_a_chatty_reward_function_fills_its_own_log_which_is_bounded_and_says_so_once(tmp_path, small):
    (tmp_path / "chatty.py").write_text(CHATTY)
    with logged(tmp_path):
        reward = FunctionReward(f"{tmp_path}/chatty.py:judge")
        assert reward.score_texts([Prompt("1", (1,), "p")] * 2, ["a", "bb"]) == [1.0, 2.0]
        reward.processes[0].end()
        reward.processes[0].printing.join(60)
        assert not reward.processes[0].printing.is_alive()
    files = sorted((tmp_path / "logs").glob("rewards.log*"))
    assert len(files) == 4
    assert sum(file.stat().st_size for file in files) <= 4 * 4096
    assert files[0].read_text().splitlines()[-1].split(" ", 2)[2] == f"chatty.py: noise 1999 {'x' * 40}"
    said = (tmp_path / "logs" / "run.log").read_text().splitlines()
    assert len(said) == 1
    assert "WARNING" in said[0]
    assert f"reward functions print much: {tmp_path}/logs/rewards.log keeps the newest" in said[0]


def test_a_full_disk_costs_messages_and_nothing_else(tmp_path, capfd, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self):
            pass

        def close(self):
            pass

        def seek(self, *_):
            pass

        def tell(self):
            return 0

    with logged(tmp_path):
        monkeypatch.setattr(log.handlers[-1], "stream", Full())
        log.info("lost")
    assert capfd.readouterr() == ("", "")


def test_loggers_are_as_before_when_the_run_has_ended(tmp_path):
    before = (log.propagate, list(log.handlers))
    with logged(tmp_path):
        assert not log.propagate
    assert (log.propagate, log.handlers) == before
