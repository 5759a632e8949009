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


def test_a_reader_that_leaves_ends_nothing(tmp_path: Path) -> None:
    recipe = RECIPES / "smoke" / "preference.yaml"
    command = [sys.executable, "-m", "rlhf.cli", "run", str(recipe), "--local", "--output", str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        running.stdout.close()
        assert running.wait() == 0
    assert (tmp_path / "run" / "stages" / "sft" / "done.json").is_file()


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
