"""Held-out rows: which they are, when they are asked, and that the model that stays is the one that did best."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from rlhf.cli import main
from rlhf.data.sequences import TokenSequence
from rlhf.errors import DataError
from rlhf.recipe.resources import local_resources
from rlhf.recipe.stage_schema import SftStage
from rlhf.stages.heldout import Heldout, split_sequences
from rlhf.tracking import Tracker

RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
tuning: {kind: full}
roles: {rollout: {engine: transformers}}
recovery: {every_minutes: 1000}
stages:
  - {name: sft, kind: sft, data: {path: sft.jsonl}, heldout_fraction: 0.5, batch_size: 6, epochs: 20,
     optimizer: {learning_rate: 0.01, schedule: constant}}
"""
CLOCK = ("time", "tokens_per_second")


def rows_of(*texts: tuple[int, ...]) -> list[TokenSequence]:
    return [TokenSequence(tokens, (True,) * len(tokens)) for tokens in texts]


def split(rows: list[TokenSequence], fraction: float, seed: int = 3) -> tuple[list, list, list[str]]:
    said: list[str] = []
    context = SimpleNamespace(seed=lambda _: seed, tracker=SimpleNamespace(say=said.append))
    stage = SftStage(kind="sft", name="sft", data={"path": "x.jsonl"}, heldout_fraction=fraction)
    train, heldout = split_sequences(stage, rows, context)
    return list(train), list(heldout), said


def test_a_share_of_the_rows_is_held_out_by_seed_in_the_order_of_the_file():
    rows = rows_of(*((n, n + 1) for n in range(200)))
    train, heldout, said = split(rows, 0.05)
    assert (len(train), len(heldout), said) == (190, 10, [])
    assert sorted(train + heldout, key=rows.index) == rows
    assert [rows.index(row) for row in heldout] == sorted(rows.index(row) for row in heldout)
    assert split(rows, 0.05)[:2] == (train, heldout)
    assert split(rows, 0.05, seed=4)[1] != heldout


def test_identical_rows_are_on_one_side():
    rows = rows_of(*((n // 3,) for n in range(90)))
    train, heldout, _ = split(rows, 0.2)
    assert len(heldout) == 18
    assert not {row.tokens for row in train} & {row.tokens for row in heldout}
    assert split(rows_of(*[(1, 2)] * 40), 0.1)[1] == []


@pytest.mark.parametrize(("count", "expected", "told"), [(19, 0, True), (20, 1, False), (21, 1, False), (30, 2, False)])
def test_one_row_at_least_of_twenty_and_none_of_fewer(count, expected, told):
    train, heldout, said = split(rows_of(*((n,) for n in range(count))), 0.05)
    assert (len(train), len(heldout), bool(said)) == (count - expected, expected, told)
    assert split(rows_of((1,), (2,)), 0.0)[2] == []


def test_all_rows_cannot_be_held_out():
    with pytest.raises(DataError, match=r"all 20 rows are held out; lower stages\.sft\.heldout_fraction"):
        split(rows_of(*((n,) for n in range(20))), 1.0)


def marks(total: int, epoch: int, evaluations: int | None) -> list[int]:
    stage = SimpleNamespace(evaluations=evaluations)
    asked = Heldout(None, [1], None, None, stage, None)
    return [step for step in range(1, total + 1) if asked.due(step, total, epoch)]


def test_evaluations_are_even_and_end_with_the_last_step():
    assert marks(12, 4, None) == [4, 8, 12]
    assert marks(12, 4, 1) == [12]
    assert marks(12, 4, 5) == [3, 5, 8, 10, 12]
    assert marks(3, 1, 10) == [1, 2, 3]
    assert not Heldout(None, [], None, None, SimpleNamespace(evaluations=None), None).due(4, 12, 4)


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for each other crawl on a busy machine."""
    monkeypatch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
    monkeypatch.setattr("rlhf.command.leave", sys.exit)  # which would end the tests too


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Answers of random letters: what a model learns of them by heart does not help with those held out."""
    letters = torch.randint(97, 123, (24, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"prompt": f"Say {n}.", "completion": bytes(word).decode()} for n, word in enumerate(letters)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def run(folder: Path, name: str, *sets: str) -> Result:
    words = [word for override in sets for word in ("--set", override)]
    command = ["run", str(folder / "recipe.yaml"), "--local", "--output", str(folder / name), *words]
    return CliRunner().invoke(main, command)


def finished(folder: Path, name: str) -> tuple[list[dict], dict, dict]:
    """Return the rows without what the clock says, the summary and the weights of the finished stage."""
    stage = folder / name / "stages" / "sft"
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]
    summary = json.loads((stage / "done.json").read_text())["summary"]
    return kept, summary, load_file(stage / "model" / "model.safetensors")


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_of_the_lowest_held_out_loss_stays_however_often_the_run_is_stopped(folder, monkeypatch):
    result = run(folder, "best")
    assert result.exit_code == 0, result.output
    rows, summary, weights = finished(folder, "best")
    losses = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    assert list(losses) == list(range(0, 41, 2))
    kept = summary["kept_step"]
    assert 2 < kept < 24
    assert losses[kept] == min(losses.values()) == summary["heldout_loss"]
    assert (summary["rows"], summary["heldout_rows"]) == (12, 12)
    assert f"sft keeps the model of step {kept} of 40" in result.stdout
    assert "sft: overfitting. The held-out loss fell to" in " ".join(result.stdout.split())
    assert not (folder / "best" / "stages" / "sft" / "state").exists()

    # The same weights as when training had ended there, and others than those it ended with.
    assert run(folder, "short", "stages.sft.keep=last", f"stages.sft.epochs={kept // 2}").exit_code == 0
    assert equal(finished(folder, "short")[2], weights)
    assert run(folder, "last", "stages.sft.keep=last").exit_code == 0
    rows_last, summary_last, weights_last = finished(folder, "last")
    assert rows_last == rows
    assert (summary_last["kept_step"], summary_last["heldout_loss"]) == (40, losses[40])
    assert not equal(weights_last, weights)

    record = Tracker.log
    stops = iter((kept - 1, kept, kept + 2, 40))
    due = next(stops)

    def log(tracker, step, metrics):
        nonlocal due
        record(tracker, step, metrics)
        if step == due:
            due = next(stops, None)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Tracker, "log", log)
    codes = [run(folder, "stopped").exit_code for _ in range(5)]
    assert codes == [130] * 4 + [0]
    rows_stopped, summary_stopped, weights_stopped = finished(folder, "stopped")
    assert (rows_stopped, summary_stopped) == (rows, summary)
    assert equal(weights_stopped, weights)


def test_states_beside_the_saved_ones_are_kept_only_while_they_are_named(folder, monkeypatch):
    """A saved state of an early step needs the best of its time, even when a later one has come since."""
    seen: list[tuple[int, list[str]]] = []
    record = Tracker.log
    best = folder / "out" / "stages" / "sft" / "state" / "best"

    def log(tracker, step, metrics):
        record(tracker, step, metrics)
        seen.append((step, sorted(path.name for path in best.glob("step-*"))))

    monkeypatch.setattr(Tracker, "log", log)
    assert run(folder, "out", "recovery={every_steps: 6, keep_last: 1}", "stages.sft.epochs=6").exit_code == 0
    found = dict(seen)
    assert found[1] == []
    assert (found[2], found[4], found[6]) == (["step-00000002"], ["step-00000004"], ["step-00000006"])
    # The state of step 6 names the best of its time, which stays until another state has taken its place.
    assert found[8] == ["step-00000006", "step-00000008"]
    assert found[10] == ["step-00000006", "step-00000010"]


def test_damaged_weights_of_the_best_step_are_not_used(folder, monkeypatch):
    load = Heldout.settle

    def settle(self, step):
        file = next((self._root / f"step-{self.best.step:08d}").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-4])
        return load(self, step)

    monkeypatch.setattr(Heldout, "settle", settle)
    result = run(folder, "out")
    assert result.exit_code == 5
    assert "the best on the held-out rows, are damaged (policy-" in result.stderr
    assert "--restart sft" in result.stderr


def test_few_rows_are_all_trained_on_and_the_last_model_stays(folder):
    result = run(folder, "out", "stages.sft.data.limit=10", "stages.sft.epochs=2")
    assert result.exit_code == 0
    assert result.stdout.count("has 10 rows, fewer than 20: none are held out") == 1
    rows, summary, _ = finished(folder, "out")
    assert summary == {"rows": 10, "heldout_rows": 0, "kept_step": 4}
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
