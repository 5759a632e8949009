"""The memory model against processes: two cases of the benchmark, which finds all within 18 %."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ("full-bf16-long", "reward-fp32")


def test_predicted_is_near_measured(tmp_path):
    out = tmp_path / "figures.json"
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.memory_model",
        "--only",
        *CASES,
        "--runs",
        "1",
        "--json",
        str(out),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert {name: found[name]["ratio"] for name in CASES} == pytest.approx(dict.fromkeys(CASES, 1.0), abs=0.2)
