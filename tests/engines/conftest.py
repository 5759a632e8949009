"""Two processes that run every case of many ranks, once for all tests."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("rank_worker.py")
TIMEOUT_S = 500


@pytest.fixture(scope="session")
def job(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the outcomes of both ranks: one pair of processes runs all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    workers, logs = [], [folder / f"log-{rank}.txt" for rank in (0, 1)]
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, str(WORKER), str(tiny_folder), str(folder), str(rank), str(port)]
            workers.append(subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT))
        codes = [worker.wait(TIMEOUT_S) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return folder
