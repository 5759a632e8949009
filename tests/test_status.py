"""How far a run is, as its folder tells: done, going on, interrupted, failed, or gone without a word."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlhf.amounts import duration
from rlhf.cli import main
from rlhf.report.status import in_use, last_metrics, read_status
from rlhf.tracking import Tracker

RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
roles: {rollout: {engine: transformers}}
recovery: {every_steps: 1}
stages:
  - {name: sft, kind: sft, data: {path: sft.jsonl}, batch_size: 1, heldout_fraction: 0}
  - {name: more, kind: sft, init: sft, data: {path: sft.jsonl}, batch_size: 1, heldout_fraction: 0}
"""
SLOW = """
import sys, time
from rlhf.tracking import Tracker
record = Tracker.log
def log(tracker, step, metrics):
    record(tracker, step, metrics)
    if tracker.stage == "more" and step == 2:
        tracker.progress._write()
        print("HERE", flush=True)
        time.sleep(600)
Tracker.log = log
from rlhf.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("status")
    rows = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(4)]
    (made / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "recipe.yaml").write_text(RECIPE)
    return made


def arguments(folder: Path, name: str) -> list[str]:
    return ["run", str(folder / "recipe.yaml"), "--local", "--output", str(folder / "runs" / name)]


def run(folder: Path, name: str, *more: str) -> Result:
    return CliRunner().invoke(main, [*arguments(folder, name), *more])


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    assert run(folder, "done").exit_code == 0
    return folder / "runs" / "done"


def states(path: Path) -> list[str]:
    return [stage.state for stage in read_status(path).stages]


def test_a_finished_run(finished):
    found = read_status(finished)
    assert (found.state, found.alive, found.error, found.pid) == ("done", False, "", os.getpid())
    assert [(s.name, s.state, s.step, s.total) for s in found.stages] == [("sft", "done", 4, 4), ("more", "done", 4, 4)]
    assert all(stage.metrics and stage.metrics["loss"] > 0 for stage in found.stages)
    assert all(stage.elapsed and stage.elapsed > 0 for stage in found.stages)
    result = CliRunner().invoke(main, ["status", str(finished)])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("trial: done, ")
    assert "4/4" in result.stdout


def test_a_stage_is_done_only_after_the_stages_it_comes_from(finished, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    (copy / "stages" / "sft" / "done.json").unlink()
    assert states(copy) == ["interrupted", "waiting"]
    shutil.rmtree(copy / "stages" / "sft")
    assert states(copy) == ["waiting", "waiting"]


def test_a_failed_run_says_why(folder, monkeypatch):
    record = Tracker.log

    def log(tracker: Tracker, step: int, metrics: dict) -> None:
        record(tracker, step, metrics)
        if step == 3:
            raise RuntimeError("the cable is out")

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", log)
        assert run(folder, "failed").exit_code == 5
    path = folder / "runs" / "failed"
    found = read_status(path)
    assert (found.state, found.alive) == ("failed", False)
    assert "the cable is out" in found.error
    stage = found.stages[0]
    assert (stage.state, stage.saved_step, stage.rest) == ("failed", 2, None)
    assert stage.step >= 2  # whatever the file of the progress, which is written once a second, says
    assert (found.stages[1].state, found.stages[1].behind) == ("waiting", "sft")
    shown = CliRunner().invoke(main, ["status", str(path)]).stdout
    assert "last error: stage sft" in shown
    assert "not run: sft failed" in shown
    assert run(folder, "failed").exit_code == 0
    assert read_status(path).state == "done"


def test_a_run_that_goes_on_and_one_that_was_killed(folder):
    path = folder / "runs" / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments(folder, "killed")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert any(line.startswith("HERE") for line in process.stdout)
        before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
        found = read_status(path)
        assert (found.state, found.alive, found.pid) == ("running", True, process.pid)
        assert [stage.state for stage in found.stages] == ["done", "running"]
        going = found.stages[1]
        assert (going.step, going.total, going.label, going.saved_step) == (2, 4, "training", 1)
        assert going.rest is not None
        assert going.rest >= 0
        assert in_use(path)
        assert CliRunner().invoke(main, ["status", str(path)]).exit_code == 0
        assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = read_status(path)
    assert (found.state, found.alive) == ("interrupted", False)
    assert f"process {process.pid} on" in found.error
    assert "gone without a word" in found.error
    assert [stage.state for stage in found.stages] == ["done", "interrupted"]
    assert run(folder, "killed").exit_code == 0  # looking on has left nothing locked
    document = json.loads(CliRunner().invoke(main, ["status", str(path), "--json"]).stdout)
    assert (document["state"], [stage["state"] for stage in document["stages"]]) == ("done", ["done", "done"])


def test_looking_on_does_not_stop_a_run_that_begins(folder, monkeypatch):
    """The lock is held for an instant by who looks; a run that begins then waits."""
    import fcntl
    import threading

    path = folder / "runs" / "looked"
    path.mkdir(parents=True)
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_SH)
    timer = threading.Timer(0.3, lambda: fcntl.flock(handle, fcntl.LOCK_UN))
    timer.start()
    assert run(folder, "looked").exit_code == 0
    timer.join()
    os.close(handle)


def test_a_folder_that_is_no_run(tmp_path):
    result = CliRunner().invoke(main, ["status", str(tmp_path)])
    assert result.exit_code == 3
    assert "is no" in result.stderr or "no such file" in result.stderr


def test_a_run_of_an_older_version_is_still_listed(finished, tmp_path):
    copy = Path(shutil.copytree(finished, tmp_path / "old"))
    text = (copy / "recipe.resolved.yaml").read_text()
    (copy / "recipe.resolved.yaml").write_text(f"key_of_old: 1\n{text}")
    (copy / "run.json").unlink()
    for stage in ("sft", "more"):
        (copy / "stages" / stage / "progress.json").unlink()
    found = read_status(copy)
    assert (found.state, [stage.state for stage in found.stages], found.stages[0].step) == ("done", ["done"] * 2, 4)


def test_the_last_metrics_of_a_long_or_torn_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path) == {}
    rows = [{"step": n, "loss": float(n), "pad": 0.5, "gone": None} for n in range(5000)]
    rows[-2]["heldout_loss"] = 7.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5000, "lo')
    assert last_metrics(path) == {"step": 4999.0, "loss": 4999.0, "pad": 0.5, "heldout_loss": 7.0}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (90, "2 min"), (5400, "1.5 h"), (90000, "1.0 d")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_list_of_runs(folder, finished):
    assert run(folder, "faster", "--set", "stages.sft.optimizer.learning_rate=0.01").exit_code == 0
    (folder / "runs" / "broken").mkdir()
    (folder / "runs" / "broken" / "recipe.resolved.yaml").write_text("name: [")
    document = json.loads(CliRunner().invoke(main, ["runs", str(folder / "runs"), "--json"]).stdout)
    by_name = {Path(entry["folder"]).name: entry for entry in document["runs"]}
    assert {"done", "faster", "broken"} <= set(by_name)
    assert (by_name["done"]["stages_done"], by_name["done"]["stages"], by_name["done"]["state"]) == (2, 2, "done")
    assert by_name["broken"]["unreadable"]
    (difference,) = document["differences"]
    assert difference["key"] == "stages.sft.optimizer.learning_rate"
    assert difference["values"][str(folder / "runs" / "faster")] == "0.01"
    assert abs(by_name["done"]["began"] - time.time()) < 600
    shown = CliRunner().invoke(main, ["runs", str(folder / "runs")])
    assert shown.exit_code == 0
    for word in ("faster", "unreadable", "what differs between the runs of trial", "learning_rate"):
        assert word in shown.stdout
    assert CliRunner().invoke(main, ["runs", str(finished)]).exit_code == 0


def test_two_clones_of_a_recipe_do_nothing_differently(folder, finished, tmp_path):
    clone = Path(shutil.copytree(folder, tmp_path / "clone", ignore=shutil.ignore_patterns("runs")))
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs / "first")
    again = ["run", str(clone / "recipe.yaml"), "--local", "--output", str(runs / "second")]
    assert CliRunner().invoke(main, again).exit_code == 0
    assert json.loads(CliRunner().invoke(main, ["runs", str(runs), "--json"]).stdout)["differences"] == []
    shutil.copy(clone / "sft.jsonl", clone / "other.jsonl")
    assert CliRunner().invoke(main, [*again, "--set", "stages.sft.data.path=other.jsonl"]).exit_code == 0
    (difference,) = json.loads(CliRunner().invoke(main, ["runs", str(runs), "--json"]).stdout)["differences"]
    assert list(difference["values"].values()) == ["sft.jsonl", "other.jsonl"]


def test_no_runs(tmp_path):
    for where in (tmp_path, tmp_path / "nowhere"):
        result = CliRunner().invoke(main, ["runs", str(where)])
        assert result.exit_code == 3
        assert "Traceback" not in result.stderr
