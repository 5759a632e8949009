"""The command line as a process of its own, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a run: that of the tests without what is set for the tests' own Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {"OMP_WAIT_POLICY": "PASSIVE", "RAY_worker_niceness": "0", **more}


def rlhf(*arguments: object, **variables: str) -> str:
    """Run ``rlhf`` with these arguments to its end and return what it printed; what it says is shown if it fails."""
    command = [sys.executable, "-m", "rlhf.cli", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(**variables))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout
