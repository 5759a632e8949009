"""The loss of Ray's head ends the run at once, with a reason, an exit code and no process left."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from actors import head
from actors.head import HeadWatch
from tests.chaos.interrupts import MARK, marked, orphans

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke" / "preference.yaml"


@pytest.fixture
def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def watch(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> tuple[HeadWatch, threading.Event]:
    """A quick watch over a listener, and what is set when it gives up."""
    monkeypatch.setattr(head, "POLL_S", 0.05)
    monkeypatch.setattr(head, "PATIENCE_S", 0.5)
    lost = threading.Event()
    monkeypatch.setattr(HeadWatch, "_give_up", lambda self: (lost.set(), self.stop()))
    host, port = listener.getsockname()
    return HeadWatch(f"{host}:{port}", lambda _: None), lost


def test_a_head_that_answers_is_left_alone(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    watching, lost = watch(listener, monkeypatch)
    with listener:
        assert not lost.wait(1.5)
    watching.stop()


def test_a_head_that_is_gone_is_noticed(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lost = watch(listener, monkeypatch)
    began = time.monotonic()
    listener.close()
    assert lost.wait(10)
    assert time.monotonic() - began > 0.4


def test_who_has_stopped_does_not_give_up(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    watching, lost = watch(listener, monkeypatch)
    watching.stop()
    listener.close()
    assert not lost.wait(1)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_run_whose_head_is_killed_ends_and_leaves_nothing(tmp_path: Path) -> None:
    mark = str(tmp_path)
    command = [sys.executable, "-m", "rlhf.cli", "run", str(RECIPE), "--output", str(tmp_path / "run")]
    environment = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ends = time.monotonic() + 150
    while not any(process.name().startswith("ray::Learner") for process in marked(mark)):
        assert process.poll() is None
        assert time.monotonic() < ends
        time.sleep(0.2)
    next(process for process in marked(mark) if process.name() == "gcs_server").kill()
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 4, said[-2000:]
    assert "is gone, and with it every process of this run; the same command goes on" in said
    assert orphans(mark) == 0
