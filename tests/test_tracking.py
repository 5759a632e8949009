"""Metrics: strict JSON lines always, and the sinks that the recipe asks for, which may fail."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from rlhf.cli import main
from rlhf.errors import RecipeError
from rlhf.installing import extra_command
from rlhf.progress import Display
from rlhf.recipe.load import load_recipe
from rlhf.report.curves import read_curve
from rlhf.sinks.base import Sinks, open_sinks
from rlhf.sinks.tensorboard import TensorboardSink
from rlhf.sinks.wandb import WandbSink
from rlhf.stage_progress import read_progress
from rlhf.tracking import Tracker
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


@pytest.fixture
def recorded(tracker):
    """A tracker that has recorded three steps, and a mark behind the third."""
    for step in (1, 2, 3):
        tracker.log(step, {"loss": step / 2, "kl": math.nan if step == 2 else 1.0})
    return tracker, tracker.mark()


def again(tracker: Tracker) -> Tracker:
    """Return the tracker of the process that goes on in the same folder."""
    return Tracker("ppo", tracker.folder, tracker.display, None)


def test_a_file_cut_anywhere_keeps_its_whole_rows_says_how_many_are_missing_and_goes_on(recorded, shown):
    tracker, mark = recorded
    data = tracker.path.read_bytes()
    lines = data.splitlines(keepends=True)
    ends = [sum(map(len, lines[: number + 1])) for number in range(3)]
    for size in range(len(data) + 1):
        tracker.path.write_bytes(data[:size])
        shown.truncate(0)
        after = again(tracker)
        after.rewind(mark)
        whole = sum(end <= size for end in ends)
        assert tracker.path.read_bytes() == b"".join(lines[:whole])
        assert [row["step"] for row in after.curve] == [1, 2, 3][:whole]
        assert after.step == 3
        said = shown.getvalue()
        assert (f"resumes without {3 - whole} of its earlier rows: {tracker.path}" in said) == (whole < 3)
        after.log(4, {"loss": 2.0})
        assert rows(after)[-1]["step"] == 4


@pytest.mark.parametrize("tail", [b"\0" * 4096, b'{"step": 4, "lo', b"\0\n\0\n", b'{"step": 4}\n'])
def test_what_follows_the_mark_is_forgotten_whatever_it_is(recorded, tail):
    tracker, mark = recorded
    data = tracker.path.read_bytes()
    tracker.path.write_bytes(data + tail)
    again(tracker).rewind(mark)
    assert tracker.path.read_bytes() == data


def test_zeros_in_place_of_the_last_rows_are_cut_off(recorded, shown):
    tracker, mark = recorded
    data = tracker.path.read_bytes()
    first = data.index(b"\n") + 1
    tracker.path.write_bytes(data[:first] + bytes(len(data) - first))
    after = again(tracker)
    after.rewind(mark)
    assert tracker.path.read_bytes() == data[:first]
    assert "resumes without 2 of its earlier rows" in shown.getvalue()


def test_a_damaged_row_between_others_costs_that_row_alone(recorded, shown):
    tracker, mark = recorded
    lines = tracker.path.read_bytes().splitlines(keepends=True)
    tracker.path.write_bytes(lines[0] + lines[1].replace(b'"step"', b"\0\0\0\0\0\0") + lines[2])
    after = again(tracker)
    after.rewind(mark)
    assert [row["step"] for row in after.curve] == [1, 3]
    assert "resumes without 1 of its earlier rows" in shown.getvalue()
    after.log(4, {"loss": 2.0})
    assert [row["step"] for row in read_curve(tracker.path)] == [1, 3, 4]
    assert [row["step"] for row in after.curve] == [1, 3, 4]


def test_a_file_that_is_gone_leaves_an_empty_curve(recorded, shown):
    tracker, mark = recorded
    tracker.path.unlink()
    tracker.rewind(mark)
    assert tracker.curve == []
    assert not tracker.path.exists()
    assert "resumes without 3 of its earlier rows" in shown.getvalue()


def test_a_curve_that_comes_back_is_the_one_that_was_logged(recorded):
    tracker, mark = recorded
    before = [dict(row) for row in tracker.curve]
    after = again(tracker)
    after.rewind(mark)
    assert str(after.curve) == str(before)  # NaN is not equal to itself


def test_marks_of_earlier_versions_have_no_number_of_rows(recorded, shown):
    tracker, mark = recorded
    del mark["rows"]
    tracker.path.write_bytes(tracker.path.read_bytes()[:-1])
    again(tracker).rewind(mark)
    assert "resumes without 1 of its earlier rows" in shown.getvalue()


def test_all_that_a_state_refers_to_is_flushed_with_its_mark_and_no_step_before(tracker, tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}"))))
    sample = tmp_path / "samples" / "step-00001.jsonl"
    sample.parent.mkdir()
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0})
        sample.write_text("{}\n")
        tracker.wrote(sample)
        tracker.wrote(tmp_path / "removed meanwhile")
    assert flushed == []
    tracker.mark()
    assert set(flushed) == {tracker.path, sample, sample.parent, tmp_path, *tmp_path.parents[:4]}
    assert flushed.index(sample) < flushed.index(sample.parent) < flushed.index(tmp_path)
    flushed.clear()
    tracker.mark()
    assert set(flushed) == {tracker.path, tmp_path}


class Recorder:
    """A sink that keeps what it gets, and fails from a step on."""

    def __init__(self, fails_at: float = math.inf) -> None:
        self.logged: list[tuple] = []
        self.fails_at = fails_at

    def log(self, stage: str, step: int, metrics: dict) -> None:
        if step >= self.fails_at:
            raise OSError("no space left")
        self.logged.append((stage, step, dict(metrics)))

    def rewind(self, stage: str, step: int) -> None:
        self.logged.append((stage, "back to", step))

    def close(self, failed: bool) -> None:
        self.logged.append(("closed", failed))


def test_a_sink_gets_the_same_numbers_and_is_told_where_the_stage_goes_on(tmp_path):
    sink = Recorder()
    tracker = Tracker("ppo", tmp_path, Display(Console(file=io.StringIO(), force_terminal=False)), sink)
    tracker.rewind(None)
    tracker.log(4, {"loss": 0.5})
    mark = tracker.mark()
    tracker.log(5, {"loss": 0.25})
    tracker.rewind(mark)
    spent = {"gradient_tokens": 0.0, "generated_tokens": 0.0}
    assert sink.logged == [
        ("ppo", "back to", 0),
        ("ppo", 4, {"loss": 0.5, **spent}),
        ("ppo", 5, {"loss": 0.25, **spent}),
        ("ppo", "back to", 4),
    ]


def test_a_sink_that_fails_is_named_once_and_the_others_go_on(caplog):
    good, bad = Recorder(), Recorder(fails_at=2)
    sinks = Sinks()
    sinks.add("good", lambda: good)
    sinks.add("bad", lambda: bad)
    sinks.add("never", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    for step in (1, 2, 3):
        sinks.log("sft", step, {"loss": 1.0})
    sinks.close(failed=False)
    assert [entry[1] for entry in good.logged] == [1, 2, 3, False]
    assert [entry[1] for entry in bad.logged] == [1]
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "tracking.never failed and gets nothing more; the run goes on: ZeroDivisionError: division by zero",
        "tracking.bad failed and gets nothing more; the run goes on: OSError: no space left",
    ]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "sft.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {n}.", "completion": str(n)}) + "\n" for n in range(4))
    )
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{wandb: {project: alignment}}", "{tensorboard: true}"))
    return tmp_path / "recipe.yaml"


def test_a_sink_without_its_package_is_refused_before_anything_starts(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    wanted = load_recipe(recipe, ["tracking.trackio.project=mine"]).recipe
    said = f"tracking.trackio: needs the package trackio: {extra_command('trackio')}"
    with pytest.raises(RecipeError, match=f"^{re.escape(said)}$"), open_sinks(wanted, recipe.parent):
        pass
    assert not (recipe.parent / "tensorboard").exists()


def test_a_run_goes_on_without_a_sink_that_cannot_write(recipe):
    out = recipe.parent / "out"
    out.mkdir()
    (out / "tensorboard").write_text("in the way")
    command = ["run", str(recipe), "--local", "--output", str(out), "--set", "stages.sft.batch_size=1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("tracking.tensorboard failed") == 1
    assert len((out / "stages" / "sft" / "metrics.jsonl").read_text().splitlines()) >= 4


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once_also_after_a_stage_went_back(tmp_path):
    sink = TensorboardSink(tmp_path)
    for step in (1, 2, 3, 4):
        sink.log("ppo", step, {"loss": 1.0, "kl": float(step)})
    sink.rewind("ppo", 2)
    sink.log("ppo", 3, {"loss": 0.5, "kl": 9.0})
    sink.log("dpo", 1, {"loss": 0.25})
    sink.close(failed=False)
    assert scalars(tmp_path / "ppo") == {"loss": [(1, 1.0), (2, 1.0), (3, 0.5)], "kl": [(1, 1.0), (2, 2.0), (3, 9.0)]}
    again = TensorboardSink(tmp_path)  # another process begins the stage anew
    again.rewind("ppo", 0)
    again.rewind("other", 0)
    again.log("ppo", 1, {"loss": 2.0})
    again.close(failed=True)
    assert scalars(tmp_path / "ppo")["loss"] == [(1, 2.0)]
    assert scalars(tmp_path / "dpo") == {"loss": [(1, 0.25)]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "ppo"]


TRACKIO = """
import json, socket, sqlite3, sys
from pathlib import Path

def refuse(*arguments):
    raise AssertionError(f"network: {arguments}")

socket.socket.connect = socket.socket.connect_ex = socket.socket.bind = refuse
socket.getaddrinfo = refuse
from rlhf.recipe.load import load_recipe
from rlhf.sinks.trackio import TrackioSink

recipe = load_recipe(Path("recipe.yaml"), ["tracking.trackio.project=mine"]).recipe
sink = TrackioSink(recipe, Path("/run"))
for step in (1, 2, 3):
    sink.log("sft", step, {"loss": float(step)})
sink.rewind("sft", 2)
sink.log("sft", 3, {"loss": 0.5, "kl": float("nan")})
TrackioSink(recipe, Path("/other")).log("sft", 1, {"loss": 7.0})
sink.close(False)
from trackio.sqlite_storage import SQLiteStorage
record = [run for run in SQLiteStorage.get_run_records("mine")]
rows = SQLiteStorage.get_logs("mine", "trial/sft", run_id=sink._id("sft"))
config = SQLiteStorage.get_run_config("mine", "trial/sft", run_id=sink._id("sft"))
print(json.dumps([len(record), [[row["step"], row["loss"]] for row in rows], str(config)]))
"""


def test_trackio_keeps_every_step_once_in_a_local_database(recipe):
    """Every connection, and every attempt to serve one, is refused; the environment asks for the network."""
    environ = {
        **os.environ,
        "TRACKIO_DIR": str(recipe.parent / "trackio"),
        "TRACKIO_SPACE_ID": "somebody/space",
        "TRACKIO_SERVER_URL": "http://127.0.0.1:9",
        "TRACKIO_BUCKET_ID": "somebody/bucket",
        "JUDGE_TOKEN": "a-secret-of-mine",
    }
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO], cwd=recipe.parent, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    runs, rows, config = json.loads(done.stdout.splitlines()[-1])
    assert (runs, rows) == (2, [[1, 1.0], [2, 2.0], [3, 0.5]])
    assert "tiny://llama" in config
    everything = b"".join(path.read_bytes() for path in (recipe.parent / "trackio").rglob("*") if path.is_file())
    for secret in (b"ray-head.internal", b"a-secret-of-mine", str(recipe.parent).encode()):
        assert secret not in everything


def test_how_far_a_stage_is_stands_in_its_folder(tracker, tmp_path):
    tracker.rewind({"step": 2, "offset": 0, "seconds": 0.0, "gradient_tokens": 0, "generated_tokens": 0})
    tracker.log(3, {"loss": 1.0})
    found = read_progress(tmp_path)
    assert found is not None
    assert (found.step, found.total, found.first) == (3, 3, 2)
    assert found.rest == 0.0
    for text in ("{", "", "\0\0", "[]", "7", '{"step": "3"}', '{"label": 1}', '{"began": null}', '{"else": 1}'):
        (tmp_path / "progress.json").write_text(text)
        assert read_progress(tmp_path) is None


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
    sink.close(failed=False)
    assert os.environ.get("WANDB_MODE") == before.get("WANDB_MODE")
    (record,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    ends = time.monotonic() + 60  # its own process writes the file
    while any(text not in record.read_bytes() for text in (b"sft/loss", b"sft/step", b"odd_metric", b"tiny://llama")):
        assert time.monotonic() < ends
        time.sleep(0.1)
    everything = b"".join(path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())
    for secret in (b"ray-head.internal", b"a-secret-of-mine"):
        assert secret not in everything
    sent = [record, *record.parent.joinpath("files").rglob("*")]  # what `wandb sync` would send; not its own logs
    for private in (str(tmp_path), socket.gethostname(), sys.executable):
        word = re.compile(rb"(?<![0-9A-Za-z])" + re.escape(private.encode()) + rb"(?![0-9A-Za-z])")  # a short host name
        assert not [path for path in sent if path.is_file() and word.search(path.read_bytes())], private


def test_who_watches_sees_the_curve_so_far_after_every_step(tmp_path):
    lengths = []
    display = Display(Console(file=io.StringIO(), force_terminal=False))
    tracker = Tracker("ppo", tmp_path, display, None, lambda curve: lengths.append([row["loss"] for row in curve]))
    tracker.log(1, {"loss": 0.5})
    tracker.log(2, {"loss": 0.25})
    assert lengths == [[0.5], [0.5, 0.25]]
