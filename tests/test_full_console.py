"""Where even messages go to a disk that takes no more, the exit code still tells what happened."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


def no_more_than(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


@pytest.mark.parametrize(
    ("command", "room", "code"),
    [
        (["validate", "nowhere.yaml"], 0, 2),
        (["validate", str(RECIPES / "smoke" / "preference.yaml")], 0, 4),
        (["validate", str(RECIPES / "smoke" / "preference.yaml")], 4096, 0),
    ],
)
def test_the_exit_code_is_right_when_nothing_can_be_printed(
    tmp_path: Path, command: list[str], room: int, code: int
) -> None:
    with (tmp_path / "log").open("wb") as log:
        ended = subprocess.run(
            [sys.executable, "-m", "rlhf.cli", *command],
            stdout=log,
            stderr=log,
            preexec_fn=lambda: no_more_than(room),
            check=False,
        )
    assert ended.returncode == code
