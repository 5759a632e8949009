"""A lock that another process holds: who waits says for whom, can be interrupted, and a dead holder holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf import patient_lock
from rlhf.patient_lock import held

HOLD = """
import sys, time
from pathlib import Path
from rlhf.patient_lock import held
with held(Path(sys.argv[1]), "converting"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock `tmp_path/lock`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patient_lock, "FIRST_S", 0.05)
    monkeypatch.setattr(patient_lock, "SAY_S", 0.1)


def test_who_waits_says_for_whom_again_and_again_until_the_holder_is_dead(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        if len(said) == 3:
            holder.kill()

    with held(tmp_path / "lock", "converting the model tiny", say):
        assert len(said) >= 3
    assert said[0].startswith(f"another process (pid {holder.pid} on ")
    assert "is converting the model tiny; waiting for it, 0 s so far" in said[0]


def test_a_wait_can_be_interrupted(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    def interrupt(_: str) -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts with `&`
    try:
        with pytest.raises(KeyboardInterrupt), held(tmp_path / "lock", "converting", interrupt):
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    assert holder.poll() is None


def test_a_free_lock_is_taken_without_a_word_and_nothing_is_left_of_the_holder(tmp_path: Path) -> None:
    said: list[str] = []
    for _ in range(2):
        with held(tmp_path / "lock", "converting", said.append):
            assert (tmp_path / "lock.holder").is_file()
    assert said == []
    assert [file.name for file in tmp_path.iterdir() if file.name != "lock"] == []


@pytest.mark.parametrize("note", [b"", b"\xff", b"[]", b'{"pid": "x"}', b"{}"])
def test_a_holder_that_left_no_readable_note_is_another_process(
    tmp_path: Path, holder: subprocess.Popen[str], note: bytes
) -> None:
    (tmp_path / "lock.holder").write_bytes(note)
    said: list[str] = []

    def say(message: str) -> None:
        said.append(message)
        holder.kill()

    with held(tmp_path / "lock", "converting", say):
        assert said[0].startswith("another process is converting")
