"""What becomes of finished stages, and of what they were made from, when a run changes, fails, is refused or dies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.api import Run
from rlhf.errors import DataError
from rlhf.export.lineage import lineage
from rlhf.export.source import find_stage
from rlhf.fingerprint import RESULTS
from rlhf.report.curves import read_curves
from rlhf.report.status import read_status
from rlhf.run_record import read_record
from tests.chaos._small_run import Ended, command, copy, go, in_this_process, interrupt, recorded_step, write_recipe
from tests.chaos.finished import finished

SLOWER = ("--set", "stages.sft.optimizer.learning_rate=0.01")
INPUTS = ("recipe.yaml", "recipe.resolved.yaml", "environment.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("finished") / "run"
    write_recipe(folder.parent)
    with in_this_process():
        assert go(folder).code == 0
        yield folder


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    yield copy(made, made.parent / "copy")
    shutil.rmtree(made.parent / "copy")


def states(folder: Path) -> dict[str, str]:
    return {stage.name: stage.state for stage in read_status(folder).stages}


def key(folder: Path, stage: str) -> str:
    return json.loads((folder / "stages" / stage / "done.json").read_text())["key"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--set", "stages.sft.max_length=8"), 3),
        (("--set", "stages.pairs.max_prompt_tokens=1000000"), 2),
        (("--set", "stages.sft.data.path=nowhere.jsonl"), 2),
        (("--restart", "nope"), 2),
    ],
)
def test_a_run_that_fails_or_is_refused_takes_nothing(folder, options, code):
    before = finished(folder)
    ended = go(folder, *options)
    assert (ended.code, ended.clean) == (code, True)
    assert finished(folder) == before
    assert go(folder).code == 0
    assert finished(folder) == before


def test_what_a_refused_run_wanted_is_not_written(folder):
    before = {name: (folder / name).read_bytes() for name in INPUTS}
    (folder / "environment.json").write_bytes(before["environment.json"] + b"\n")
    assert go(folder, "--set", "stages.pairs.max_prompt_tokens=1000000", *SLOWER).code == 2
    (folder / "stages" / "sft" / "model" / "config.json").write_text("{}")
    assert go(folder, "--set", "stages.dpo.beta=0.7").code == 3
    assert (folder / "recipe.resolved.yaml").read_bytes() == before["recipe.resolved.yaml"]
    assert (folder / "environment.json").read_bytes() != before["environment.json"]
    record = read_record(folder)
    assert record is not None
    assert record.outcome == "failed"
    assert "sft is damaged" in record.error


def test_a_folder_whose_only_run_was_refused_says_why(folder):
    other = folder.with_name("refused")
    assert go(other, "--set", "stages.pairs.max_prompt_tokens=1000000").code == 2
    assert [path.name for path in other.iterdir() if path.name in INPUTS] == []
    ended = command("status", other)
    assert ended.code == 3
    assert "its last run was refused: " in ended.said
    assert "positions" in ended.said
    shutil.rmtree(other)


def test_a_changed_stage_is_made_beside_the_finished_one(folder):
    before, old = finished(folder), key(folder, "sft")
    with recorded_step("sft", 2, interrupt):
        assert go(folder, *SLOWER).code == 130
    assert finished(folder) == before
    assert states(folder) == {"sft": "interrupted", "pairs": "waiting", "dpo": "waiting", "duel": "waiting"}
    assert read_status(folder).stages[0].saved_step == 2
    assert command("checkpoint", "verify", folder).code == 0
    assert not Run(folder).stages["sft"].done
    assert len(Run(folder).stages["sft"].metrics) == 2
    assert set(read_curves(folder)) == {"sft", "pairs", "dpo"}
    assert find_stage(folder / "sft").done["key"] == old  # the finished one serves until its successor is done
    assert go(folder, *SLOWER).code == 0
    assert states(folder) == dict.fromkeys(("sft", "pairs", "dpo", "duel"), "done")
    assert before.items() <= finished(folder).items()
    kept = f"sft.{old[:8]}"
    assert find_stage(folder / kept).done["key"] == old
    assert find_stage(folder / kept).stage == "sft"
    (earlier,) = folder.glob("stages/dpo.*")
    dpo = find_stage(folder / earlier.name)
    assert dpo.start() == folder / "stages" / kept / "model"
    assert [(step.name, step.changed) for step in lineage(dpo)] == [("sft", False), ("pairs", False), ("dpo", False)]
    assert go(folder).code == 0  # and back
    assert {key(folder, "sft"), find_stage(folder / "sft").done["key"]} == {old}


def test_an_attempt_that_was_given_up_does_not_hide_the_finished_stage(folder):
    with recorded_step("sft", 2, interrupt):
        assert go(folder, *SLOWER).code == 130
    assert go(folder).code == 0
    assert states(folder) == dict.fromkeys(("sft", "pairs", "dpo", "duel"), "done")
    ended = go(folder, "--set", "stages.sft.optimizer.learning_rate=0.02")
    assert ended.code == 2
    assert "learning_rate 0.01 -> 0.02" in ended.said
    assert go(folder, *SLOWER).code == 0


def test_stages_that_follow_a_changed_one_wait(folder):
    with recorded_step("dpo", 2, interrupt):
        assert go(folder, *SLOWER).code == 130
    assert states(folder) == {"sft": "done", "pairs": "done", "dpo": "interrupted", "duel": "waiting"}
    with recorded_step("dpo", 3, lambda: os._exit(77)):
        child = os.fork()
        if child == 0:
            go(folder, *SLOWER)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 77
    assert states(folder) == {"sft": "done", "pairs": "done", "dpo": "interrupted", "duel": "waiting"}
    assert go(folder, *SLOWER).code == 0


@pytest.mark.parametrize("text", ["", '{"key": 1, "content": {"stage": {"kind": "sft"}}}'])
def test_every_command_says_the_same_of_a_damaged_done_file(folder, text):
    file = folder / "stages" / "sft" / "done.json"
    whole = file.read_bytes()
    file.write_text(text)
    said = "stages/sft is damaged (done.json: truncated or changed); put the file back, or make the stage again"
    ended = go(folder)
    assert (ended.code, ended.clean, said in ended.said) == (3, True, True)
    with pytest.raises(DataError, match=r"done.json: truncated or changed"):
        find_stage(folder / "sft")
    found = read_status(folder)
    assert (found.stages[0].state, said in found.error) == ("damaged", True)
    assert "the same `rlhf run` goes on" not in command("status", folder).said
    assert command("checkpoint", "verify", folder).code == 3
    file.write_bytes(whole)
    assert go(folder).code == 0


def test_a_changed_digit_of_a_done_file_is_damage(folder):
    file = folder / "stages" / "sft" / "done.json"
    file.write_text(file.read_text().replace('"seed": 17', '"seed": 18'))
    assert "done.json: truncated or changed" in go(folder).said


@pytest.mark.parametrize("name", ["recipe.resolved.yaml", "environment.json", "run.json", "report.json"])
def test_a_damaged_file_at_the_top_is_written_again(folder, name, tmp_path):
    for text in ("", "{", "[1]", "1"):
        (folder / name).write_text(text)
        output = ("-o", tmp_path / "report.html")
        looked = [command("status", folder), command("runs", folder), command("compare", folder, *output)]
        assert all(ended.clean and ended.code in (0, 3) for ended in looked), looked
    before = finished(folder)
    assert go(folder).code == 0
    assert finished(folder) == before
    assert command("status", folder) == Ended(0, "")


@pytest.mark.parametrize("name", ["report.html", "report.json", "leaderboard.csv"])
def test_a_lost_report_is_said(folder, name):
    (folder / "stages" / "duel" / name).unlink()
    ended = go(folder)
    assert (ended.code, f"{name}: missing" in ended.said, "--restart duel" in ended.said) == (3, True, True)
    done = folder / "stages" / "duel" / "done.json"  # of a version that did not seal reports
    done.write_text(json.dumps({name: json.loads(done.read_text())[name] for name in ("key", "content", "cost")}))
    ended = go(folder)
    assert (ended.code, ended.clean, "--restart duel" in ended.said) == (3, True, True)
    assert go(folder, "--restart", "duel").code == 0


def test_a_folder_of_an_older_version_is_not_made_again(folder, monkeypatch):
    """Its keys hold the version, which stands in every key that follows; its files have no checksum."""
    monkeypatch.setattr("rlhf.fingerprint.RESULTS", dict.fromkeys(RESULTS, 1))
    for file in folder.glob("stages/*/done.json"):
        done = json.loads(file.read_text())
        content = {name: value for name, value in done["content"].items() if name != "results"} | {"version": "0.1.0"}
        content["upstream"] = {
            name: key if name == "base" else f"old {name}" for name, key in content["upstream"].items()
        }
        del content["stage"]["seed"]
        new = {"key": f"old {file.parent.name}", "content": content, "pairs": done["results"]}
        file.write_text(json.dumps({name: done[name] for name in ("cost", "summary", "files", "adapter")} | new))
    before = finished(folder)
    assert go(folder).code == 0
    assert finished(folder) == before
    assert states(folder) == dict.fromkeys(("sft", "pairs", "dpo", "duel"), "done")
    assert go(folder, "--set", "stages.dpo.beta=0.4").code == 0
    assert key(folder, "pairs") == "old pairs"
    assert find_stage(folder / "dpo").content["upstream"]["sft"] == "old sft"


def test_a_full_disk_when_a_stage_is_sealed_is_said_and_the_stage_resumes(folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr("rlhf.stage_folder.write_done", full)
        ended = go(folder, *SLOWER)
    assert (ended.code, ended.clean) == (4, True)
    assert "stage sft cannot be finished: No space left on device" in ended.said
    assert states(folder)["sft"] == "failed"
    assert go(folder, *SLOWER).code == 0
