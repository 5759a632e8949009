"""The parts that need Ray, in a Ray of their own: the process that measures starts and leaves it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PROGRAM = """
import json
from dataclasses import replace
from actors.bench import cluster
from rlhf.bench.figures import Figure
from rlhf.bench.setting import OWN_STAGES, Setting
from rlhf.recipe.schema import Recipe

stage = {"name": "sft", "kind": "sft", **OWN_STAGES["sft"]}
recipe = Recipe.model_validate({
    "name": "tiny", "model": {"path": "tiny://llama", "dtype": "float32"}, "stages": [stage],
    "roles": {"rollout": {"engine": "transformers", "replicas": 3}},
})
setting = replace(Setting.of(recipe), cores=1)
known = [Figure("copy", 10.0, "1 thread"), Figure("gemm float32", 1.0, "1 thread")]
with cluster(setting) as measurements:
    found = [figure for part in ("rollouts", "transfer", "ray") for figure in measurements[part](known)]
print(json.dumps([figure.as_dict() for figure in found]))
"""


def test_engine_publishing_and_calls_are_measured():
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept |= {"OMP_WAIT_POLICY": "PASSIVE", "RAY_worker_niceness": "0"}
    command = [sys.executable, "-c", PROGRAM]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], env=kept, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = {figure["name"]: figure for figure in json.loads(ended.stdout.splitlines()[-1])}
    assert list(found) == ["rollouts", "publish", "publish rate", "call", "fan-out", "batch"]
    assert all(figure["value"] > 0 for figure in found.values())
    for name in ("rollouts", "publish rate", "batch"):  # shares of limits that the test made up: never below 1 for sure
        assert found[name]["fraction"] == pytest.approx(found[name]["value"] / found[name]["limit"])
    assert found["batch"]["limit"] == 5.0  # half of copying at 10 GB/s: one copy is a read and a write
    bytes_sent = 4 * (73_728 + 262 * 64 + 5 * 64)
    assert found["publish rate"]["value"] == pytest.approx(bytes_sent / found["publish"]["value"] / 1e9)
