"""The pulse of a process: what is done counts, and within a library the bytes that move."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf import pulse
from rlhf.activity import UNIT, activity
from rlhf.pulse import Pulse


def test_what_is_done_counts_and_what_is_being_done_is_named() -> None:
    one = Pulse()
    assert one.sampled() == (0, "")
    one.begin("policy.train")
    one.beat()
    assert one.sampled() == (2, "policy.train")
    assert one.sampled() == (2, "policy.train")


def test_within_a_library_bytes_that_move_count(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = [(1, 1, 1)]
    monkeypatch.setattr(pulse, "activity", lambda: moved[0])
    one = Pulse()
    with one.within_library("loading"):
        first = one.sampled()[0]
        assert one.sampled() == (first, "loading")
        moved[0] = (1, 1, 2)
        assert one.sampled() == (first + 1, "loading")
        assert one.sampled() == (first + 1, "loading")
    after = one.sampled()[0]
    moved[0] = (1, 1, 3)
    assert one.sampled()[0] == after


def test_bytes_read_and_held_are_activity_also_in_a_child(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(2 * UNIT))
    before = activity()
    large.read_bytes()
    assert activity()[0] > before[0]
    child = "held = b'x' * int(2 * 2**24); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    assert activity(process.pid)[2] >= 2
    assert activity(os.getpid())[2] >= activity(process.pid)[2]
    process.kill()
    process.communicate()


def test_a_process_that_has_ended_counts_as_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert activity(process.pid) == (0, 0, 0)
