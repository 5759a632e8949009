"""Weights for replicas on another node than the policy travel through the object store, and are as good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.ray
def test_replicas_on_another_node_get_the_same_weights(tiny_folder):
    path = os.pathsep.join(str(folder) for folder in (HERE.parents[1], HERE, HERE.parent))
    ended = subprocess.run(
        [sys.executable, HERE / "two_nodes.py", tiny_folder],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    rounds = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [told["version"] for told in rounds] == [1, 2]
    for told in rounds:
        here, *far = told["replicas"]
        assert {replica["node"] for replica in far} != {here["node"]}
        assert not here["relayed"]
        assert all(replica["relayed"] for replica in far)
        for replica in told["replicas"]:
            assert replica["served"] == [told["version"], told["checksum"]]
            assert replica["difference"] < 5e-5
