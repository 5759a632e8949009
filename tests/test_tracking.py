"""Metrics: strict JSON lines always, Weights & Biases on the side where the recipe asks for it."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.progress import Display
from rlhf.recipe.load import load_recipe
from rlhf.tracking import Tracker, WandbSink
from rlhf.types import Metrics

RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
ray: {address: "ray-head.internal:6379"}
tracking: {wandb: {project: alignment}}
stages:
  - {name: sft, kind: sft, data: {path: sft.jsonl}}
"""


def strictly(line: str) -> dict:
    """Parse JSON that has no NaN or Infinity."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return json.loads(line, parse_constant=refuse)


@pytest.fixture
def shown():
    return io.StringIO()


@pytest.fixture
def tracker(tmp_path, shown):
    made = Tracker("ppo", tmp_path, Display(Console(file=shown, force_terminal=False, width=200)), None)
    made.begin("", 3)
    return made


def rows(tracker: Tracker) -> list[dict]:
    return [strictly(line) for line in tracker.path.read_text().splitlines()]


def test_each_step_is_one_line_with_step_and_time(tracker, tmp_path, shown):
    assert tracker.path == tmp_path / "metrics.jsonl"
    before = time.time()
    tracker.log(1, {"loss": 0.5, "kl": 1})
    tracker.spend(gradient_tokens=70, generated_tokens=20)
    tracker.spend(gradient_tokens=30)
    tracker.log(2, Metrics.of(4, loss=1.0))
    assert [{key: row[key] for key in row if key != "time"} for row in rows(tracker)] == [
        {"step": 1, "loss": 0.5, "kl": 1.0, "gradient_tokens": 0.0, "generated_tokens": 0.0},
        {"step": 2, "loss": 0.25, "gradient_tokens": 100.0, "generated_tokens": 20.0},
    ]
    assert all(before <= row["time"] <= time.time() for row in rows(tracker))
    assert tracker.step == 2
    tracker.log(3, {"loss": 0.125})
    assert shown.getvalue().splitlines() == ["ppo: 3 steps", "ppo: step 3/3  loss 0.125  eta 0s"]


def test_numbers_keep_every_digit(tracker):
    value = 0.1 + 0.2
    tracker.log(1, {"loss": value, "small": 1e-300})
    assert (rows(tracker)[0]["loss"], rows(tracker)[0]["small"]) == (value, 1e-300)


def test_what_is_not_finite_becomes_null(tracker):
    tracker.log(1, {"loss": float("nan"), "kl": float("inf"), "gold": float("-inf"), "reward": 2.0})
    row = rows(tracker)[0]
    assert (row["loss"], row["kl"], row["gold"], row["reward"]) == (None, None, None, 2.0)


def test_a_step_without_metrics_is_shown_and_not_recorded(tracker, shown):
    tracker.advance(3, {"length": 7.0})
    assert not tracker.path.exists()
    assert tracker.step == 3
    assert shown.getvalue().splitlines()[-1] == "ppo: step 3/3  length 7  eta 0s"


class Recorder:
    """Stands where the Weights & Biases sink stands."""

    def __init__(self) -> None:
        self.logged: list[tuple] = []

    def log(self, *arguments: object) -> None:
        self.logged.append(arguments)


def test_the_other_sink_gets_the_same_numbers(tmp_path):
    sink = Recorder()
    tracker = Tracker("ppo", tmp_path, Display(Console(file=io.StringIO(), force_terminal=False)), sink)  # type: ignore[arg-type]
    tracker.log(4, {"loss": 0.5})
    assert sink.logged == [("ppo", 4, {"loss": 0.5, "gradient_tokens": 0.0, "generated_tokens": 0.0})]


def test_wandb_without_a_key_writes_an_offline_run_into_the_run_folder(tmp_path, monkeypatch):
    """Every address that is not this machine's is out of reach, so a sink that went online would fail or wait."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("JUDGE_TOKEN", "a-secret-of-mine")
    (tmp_path / "sft.jsonl").write_text("{}\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    before = dict(os.environ)
    folder = tmp_path / "run"
    folder.mkdir()
    sink = WandbSink(load_recipe(tmp_path / "recipe.yaml").recipe, folder)
    sink.log("sft", 1, {"loss": 0.5})
    sink.log("sft", 2, {"loss": 0.25, "odd_metric": float("nan")})
    sink.close()
    assert os.environ.get("WANDB_MODE") == before.get("WANDB_MODE")
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    ends = time.monotonic() + 60  # its own process writes the file
    while any(text not in record.read_bytes() for text in (b"sft/loss", b"sft/step", b"odd_metric", b"tiny://llama")):
        assert time.monotonic() < ends
        time.sleep(0.1)
    everything = b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())
    for secret in (b"ray-head.internal", b"a-secret-of-mine"):
        assert secret not in everything


def test_who_watches_sees_the_curve_so_far_after_every_step(tmp_path):
    lengths = []
    display = Display(Console(file=io.StringIO(), force_terminal=False))
    tracker = Tracker("ppo", tmp_path, display, None, lambda curve: lengths.append([row["loss"] for row in curve]))
    tracker.log(1, {"loss": 0.5})
    tracker.log(2, {"loss": 0.25})
    assert lengths == [[0.5], [0.5, 0.25]]
