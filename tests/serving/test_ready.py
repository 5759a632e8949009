"""Waiting for a server that starts: as long as it makes progress, and no longer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from rlhf.errors import TrainingError
from rlhf.serving import server
from rlhf.serving.plan import Serving
from rlhf.serving.server import Endpoint, Server

SERVING = Serving(Path("tiny"), "tiny")
ENDPOINT = Endpoint("127.0.0.1", 1)


@pytest.fixture
def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A process that is there and answers nothing, with a log."""
    monkeypatch.setattr(server, "POLL_S", 0.02)
    log = tmp_path / "log"
    log.write_text("INFO loading weights\nINFO shard 3 of 9\n")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    found = Server(process, log)
    yield found
    found.stop()


def test_a_server_that_hangs_is_given_up_with_its_last_lines_and_the_flag(
    starting: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "_healthy", staticmethod(lambda _: False))
    with pytest.raises(TrainingError) as caught:
        starting.wait_ready(SERVING, ENDPOINT, 1.5)
    said = str(caught.value).splitlines()
    assert said[0] == "vLLM is not ready and has made no progress for 1.5 s (--ready-timeout); it said last:"
    assert said[1:] == ["INFO loading weights", "INFO shard 3 of 9"]


@pytest.mark.parametrize("progress", ["a line in its log", "bytes that move"])
def test_a_server_that_makes_progress_is_waited_for_past_the_deadline(
    starting: Server, monkeypatch: pytest.MonkeyPatch, progress: str
) -> None:
    """Nothing between two looks is within a deadline of 0 s, so each look must find progress."""
    looks = 0

    def healthy(_: Endpoint) -> bool:
        nonlocal looks
        looks += 1
        if progress == "a line in its log":
            with starting.log.open("a") as log:
                log.write("INFO another shard\n")
        return looks > 20

    if progress == "bytes that move":
        monkeypatch.setattr(server, "activity", lambda pid: (looks,))
    monkeypatch.setattr(Server, "_healthy", staticmethod(healthy))
    asked: list[dict[str, Any]] = []

    def post(url: str, **how: Any) -> httpx.Response:
        asked.append(how)
        return httpx.Response(200)

    monkeypatch.setattr(httpx, "post", post)
    starting.wait_ready(SERVING, ENDPOINT, 0.0)
    assert looks == 21
    assert [how["json"]["model"] for how in asked] == ["tiny"]


def test_a_server_that_ends_is_told_at_once(starting: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "_healthy", staticmethod(lambda _: False))
    starting.process.kill()
    starting.process.wait()
    with pytest.raises(TrainingError, match="ended with code -9"):
        starting.wait_ready(SERVING, ENDPOINT, 600)
