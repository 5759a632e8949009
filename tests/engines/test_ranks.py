"""Ranks that are lost are noticed by the others, in time and by name."""

import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from lost_rank import DEADLINE_S

from rlhf.engines.ranks import LISTENING, exchanging, listen

SCRIPT = Path(__file__).with_name("lost_rank.py")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("fate", ["dies", "sleeps"])
def test_a_lost_rank_is_an_error_within_the_deadline(fate: str) -> None:
    ranks = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(rank), fate], stdin=PIPE, stdout=PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        assert [rank.stdout.readline() for rank in ranks if rank.stdout] == ["ready\n"] * 2
        port = free_port()
        for rank in ranks:
            rank.stdin.write(f"{port}\n")
            rank.stdin.flush()
        seconds, _, message = ranks[0].communicate(timeout=300)[0].partition(" ")
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert message.startswith("policy.train: rank 0 of 2 lost another rank in all_reduce, which died or missed the")
    assert float(seconds) < 3 * DEADLINE_S
    assert (float(seconds) > DEADLINE_S - 1) == (fate == "sleeps")


def test_ranks_that_do_not_come_are_an_error() -> None:
    port = free_port()
    command = [sys.executable, str(SCRIPT), "0", "comes never"]
    said = subprocess.run(command, input=f"{port}\n", capture_output=True, text=True, timeout=300, check=True).stdout
    assert said.startswith(f"ready\nrank 0 of 2: the ranks did not meet at 127.0.0.1:{port} within 1 s")


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^shape mismatch$"), exchanging("policy.train"):
        raise RuntimeError("shape mismatch")


def test_no_other_process_takes_the_port_where_ranks_will_meet() -> None:
    port = listen("127.0.0.1")
    with LISTENING.pop(port), pytest.raises(OSError, match="in use"):
        socket.create_server(("127.0.0.1", port))
