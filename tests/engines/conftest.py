"""Two processes that run the cases of a script together."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TIMEOUT_S = 500


@pytest.fixture(scope="session")
def two_ranks(tiny_folder: Path) -> Callable[[str, Path], None]:
    """Run a script of this folder in two processes: `script MODEL_FOLDER JOB_FOLDER RANK PORT`."""

    def run(script: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        workers, logs = [], [folder / f"log-{rank}.txt" for rank in (0, 1)]
        try:
            for rank, log in enumerate(logs):
                command = [sys.executable, str(HERE / script), str(tiny_folder), str(folder), str(rank), str(port)]
                workers.append(subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT))
            codes = [worker.wait(TIMEOUT_S) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)

    return run
