"""The run that all tests here take something out of."""

from pathlib import Path

import pytest
from finished_run import finished_run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory)
