"""A local Ray for the tests of the actors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this machine alone, on loopback; four slots, whatever the number of cores. Workers find test modules."""
    import ray

    path = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent, HERE.parents[1]))

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )
    yield
    ray.shutdown()
