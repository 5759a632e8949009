"""Nine ordinary mistakes in a recipe, and what the real `rlhf run` says about each in a process of its own."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tests.chaos.row import Row, only

COUNT = 9
MAX_LINES = 6
SLOW_S = 120

RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
backend: local
roles: {rollout: {engine: transformers}}
stages:
  - name: sft
    kind: sft
    data: {path: chats.jsonl}
  - name: dpo
    kind: dpo
    policy: sft
    data: {path: pairs.jsonl}
    beta: 0.1
"""
MISTAKES: Mapping[str, tuple[str, str, str, int]] = {
    "unknown key": ("    beta: 0.1", "    betta: 0.1", "recipe.yaml:13:5: ", 2),
    "wrong type": ("beta: 0.1", "beta: small", "recipe.yaml:13:11: ", 2),
    "missing file": ("pairs.jsonl", "pears.jsonl", "recipe.yaml:12:18: ", 2),
    "missing column": ("chats.jsonl", "lacking.jsonl", "lacking.jsonl:2: ", 3),
    "bad model path": ('"tiny://llama"', "SmolLM3-135M", "recipe.yaml:2:15: ", 2),
    "tab indentation": ("    kind: dpo", "\tkind: dpo", "recipe.yaml:10:1: ", 2),
    "duplicate key": ("beta: 0.1", "beta: 0.1\n    policy: sft", "recipe.yaml:14:5: ", 2),
    "unknown stage": ("policy: sft", "policy: stf", "recipe.yaml:11:13: ", 2),
    "number out of range": ("beta: 0.1", "beta: -0.1", "recipe.yaml:13:11: ", 2),
}
"""What is replaced by what, the position that must be named, and the exit code."""


def run(count: int, rng: random.Random) -> Row:
    """Make the first `count` mistakes (each again where there are more) and run the recipe."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_data(folder)
        for mistake in (list(MISTAKES) * -(-count // len(MISTAKES)))[:count]:
            seen.update(refused(folder, mistake))
    wrong = {what: seen[what] for what in ("tracebacks", "over 6 lines", "without position", "wrong exit", "hangs")}
    passed = not any(wrong.values())
    return Row("bad recipes", "0 tracebacks, at most 6 lines, position given", {"injected": count} | wrong, passed)


def refused(folder: Path, mistake: str) -> list[str]:
    """Run the recipe with one mistake, and return what is wrong with how that is said."""
    old, new, place, code = MISTAKES[mistake]
    assert old in RECIPE
    (folder / "recipe.yaml").write_text(RECIPE.replace(old, new, 1))
    command = [sys.executable, "-m", "rlhf.cli", "run", "recipe.yaml", "--output", "out"]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    try:
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=SLOW_S)
    except subprocess.TimeoutExpired:
        return ["hangs"]
    said = done.stderr + done.stdout
    return [
        what
        for what, wrong in (
            ("tracebacks", "Traceback" in said or re.search(r'File ".*", line \d+', said)),
            ("over 6 lines", len(said.splitlines()) > MAX_LINES),
            ("without position", place not in said),
            ("wrong exit", done.returncode != code),
        )
        if wrong
    ]


def _write_data(folder: Path) -> None:
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    pair = {"prompt": "Why?", "chosen": "yes", "rejected": "no"}
    files = {
        "chats.jsonl": [{"messages": turns}] * 2,
        "pairs.jsonl": [pair] * 2,
        "lacking.jsonl": [{"messages": turns}, {"text": "Why?"}],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    only(run, COUNT)
