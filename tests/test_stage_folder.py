"""Where a stage is made, how it takes its name, and what stays of the one before, whenever the process dies."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf import checkpoint
from rlhf.done_file import Damaged, damage, read_done
from rlhf.errors import RecipeError
from rlhf.report.results import Cost
from rlhf.stage_folder import StageFolder
from rlhf.stage_places import kept_folders, new_place, set_aside, stage_folders, stage_of

COST = Cost(1, 2, 3.0, 4.0)


class Died(BaseException):
    """The process was killed here."""


def content(rate: float = 0.1, **more: Any) -> dict[str, Any]:
    return {"results": 1, "seed": 17, "stage": {"kind": "sft", "rate": rate, **more}, "upstream": {}}


def opened(run: Path, rate: float = 0.1, restart: bool = False) -> StageFolder:
    found = StageFolder(run / "stages" / "sft", content(rate), content(rate), restart)
    found.check()
    return found


def fill(found: StageFolder, rate: float) -> None:
    place = found.place
    (place / "model").mkdir(parents=True, exist_ok=True)
    (place / "model" / "weights").write_text(f"{rate}")
    (place / "pairs.jsonl").write_text(f"pairs {rate}")
    save(found, 1)


def save(found: StageFolder, step: int) -> None:
    info = {"content": found.content}
    checkpoint.write(
        found.place / "state", step, found.key, lambda folder: (folder / "x").write_text("x") and None, info
    )


def make(run: Path, rate: float = 0.1, restart: bool = False, keep_old: int = 1) -> list[str]:
    """Do what a run does with a stage, and return what it said."""
    said: list[str] = []
    found = opened(run, rate, restart)
    if found.whole:
        found.reuse(keep_old, said.append)
        return [*said, "reused"]
    found.prepare()
    fill(found, rate)
    found.finish({"rate": rate}, COST, {}, keep_old, said.append)
    return said


def whole(run: Path) -> dict[float, str]:
    """Return the finished stages that are whole, by what they were made with: the names of their folders."""
    found = {}
    for file in sorted(run.glob("stages/*/done.json"), key=lambda file: file.parent.name == "sft"):
        if file.parent.name.startswith(".") and file.parent.name != ".sft.new":
            continue  # it is being removed
        done = read_done(file)
        assert damage(file.parent, done) == []
        rate = done["content"]["stage"]["rate"]
        assert (file.parent / "model" / "weights").read_text() == f"{rate}"
        found[rate] = file.parent.name
    return found


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "stages").iterdir())


def test_a_changed_stage_is_made_beside_the_finished_one_which_is_kept(tmp_path):
    assert make(tmp_path) == []
    first = opened(tmp_path).key
    changed = opened(tmp_path, 0.2)
    assert (changed.whole, changed.why) == (None, "rate 0.1 -> 0.2")
    changed.prepare()
    assert changed.place == tmp_path / "stages" / ".sft.new"
    assert whole(tmp_path) == {0.1: "sft"}
    fill(changed, 0.2)
    said: list[str] = []
    changed.finish({}, COST, {}, 1, said.append)
    assert whole(tmp_path) == {0.2: "sft", 0.1: f"sft.{first[:8]}"}
    (line,) = said
    assert f"sft: the finished stage before it is kept as sft.{first[:8]} (0.0 MiB" in line
    assert [folder.name for folder in stage_folders(tmp_path)] == ["sft"]
    assert not list(tmp_path.rglob("state"))


def test_settings_that_come_back_bring_the_kept_stage_back(tmp_path):
    make(tmp_path)
    make(tmp_path, 0.2)
    said = make(tmp_path)
    assert said[-1] == "reused"
    assert "made with these settings before, is brought back" in said[0]
    assert (whole(tmp_path)[0.1], set(whole(tmp_path))) == ("sft", {0.1, 0.2})
    assert make(tmp_path) == ["reused"]


def test_so_many_old_ones_stay_as_the_recipe_wants(tmp_path):
    for rate in (0.1, 0.2, 0.3, 0.4):
        make(tmp_path, rate, keep_old=2)
    assert set(whole(tmp_path)) == {0.2, 0.3, 0.4}
    (line,) = make(tmp_path, 0.5, keep_old=0)[-1:]
    assert "is removed, as recovery.keep_old is 0" in line
    assert whole(tmp_path) == {0.5: "sft"}
    assert names(tmp_path) == ["sft"]


def test_a_stage_brought_back_counts_as_the_newest(tmp_path):
    make(tmp_path, 0.1, keep_old=2)
    make(tmp_path, 0.2, keep_old=2)
    make(tmp_path, 0.3, keep_old=2)
    make(tmp_path, 0.1, keep_old=2)
    make(tmp_path, 0.4, keep_old=2)
    assert set(whole(tmp_path)) == {0.1, 0.3, 0.4}


def test_a_finished_stage_that_begins_again_keeps_its_key_and_what_was_there(tmp_path):
    make(tmp_path)
    make(tmp_path, restart=True, keep_old=3)
    make(tmp_path, restart=True, keep_old=3)
    key = opened(tmp_path).key
    assert names(tmp_path) == ["sft", f"sft.{key[:8]}", f"sft.{key[:8]}-2"]
    assert {read_done(file)["key"] for file in tmp_path.glob("stages/*/done.json")} == {key}


@pytest.mark.parametrize("file", ["model/weights", "pairs.jsonl", "done.json"])
@pytest.mark.parametrize("harm", [lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 2)])
def test_damage_is_an_error_with_a_remedy_and_the_damaged_stage_is_kept(tmp_path, file, harm):
    make(tmp_path)
    path = tmp_path / "stages" / "sft" / file
    harm(path)
    harmed = path.read_bytes()
    with pytest.raises(Damaged, match=rf"stages/sft is damaged \({file}.*--restart sft.*keeps what is there as"):
        opened(tmp_path)
    make(tmp_path, restart=True)
    assert make(tmp_path) == ["reused"]
    (kept,) = kept_folders(tmp_path / "stages" / "sft")
    assert (kept / file).read_bytes() == harmed


def test_a_damaged_stage_neither_drives_out_a_whole_one_nor_goes_itself(tmp_path):
    make(tmp_path, 0.1)
    make(tmp_path, 0.2)  # 0.1 is kept
    (tmp_path / "stages" / "sft" / "model" / "weights").write_text("0.?")
    make(tmp_path, 0.2, restart=True)  # the damaged one is kept beside it
    make(tmp_path, 0.3)
    kept = {(folder / "model" / "weights").read_text() for folder in kept_folders(tmp_path / "stages" / "sft")}
    assert kept == {"0.?", "0.2"}  # the newest whole one, as keep_old is 1, and the damaged one


def test_an_attempt_that_saved_nothing_is_named_when_the_finished_stage_is_used(tmp_path):
    make(tmp_path)
    opened(tmp_path, restart=True).prepare()
    assert make(tmp_path) == ["sft: the attempt to make it again saved nothing; the finished one is used", "reused"]


def test_a_model_whose_done_json_was_removed_is_set_aside_and_not_deleted(tmp_path, caplog):
    make(tmp_path)
    (tmp_path / "stages" / "sft" / "done.json").unlink()
    make(tmp_path)
    assert names(tmp_path) == ["sft", "sft.damaged"]
    assert (tmp_path / "stages" / "sft.damaged" / "model" / "weights").read_text() == "0.1"
    assert "a model without done.json is kept as sft.damaged" in caplog.text


def test_a_kept_stage_that_is_wanted_and_damaged_is_said_too(tmp_path):
    make(tmp_path)
    make(tmp_path, 0.2)
    (kept,) = kept_folders(tmp_path / "stages" / "sft")
    (kept / "pairs.jsonl").unlink()
    with pytest.raises(Damaged, match=rf"{kept.name} is damaged \(pairs.jsonl: missing\)"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["NOTES.txt", ".DS_Store", ".nfs0001", "README.md", "model/x.gguf", "model/.DS_Store"])
def test_files_that_are_not_sealed_are_no_damage(tmp_path, name):
    make(tmp_path)
    (tmp_path / "stages" / "sft" / name).write_bytes(b"x")
    (tmp_path / "stages" / "notes.txt").write_bytes(b"x")
    assert make(tmp_path) == ["reused"]


@pytest.mark.parametrize("before", [False, True])
def test_an_interrupted_stage_resumes_or_is_refused(tmp_path, before):
    if before:
        make(tmp_path, 0.1)
    begun = opened(tmp_path, 0.2)
    begun.prepare()
    save(begun, 3)
    again = opened(tmp_path, 0.2)
    assert again.resumes
    again.prepare()
    assert (again.place / "state" / "step-00000003").is_dir()
    with pytest.raises(RecipeError, match=r"interrupted after step 3 with other settings: rate 0.2 -> 0.3"):
        opened(tmp_path, 0.3)
    if before:
        assert make(tmp_path, 0.1) == ["reused"]
        assert opened(tmp_path, 0.2).resumes
    make(tmp_path, 0.3, restart=True)
    assert set(whole(tmp_path)) == ({0.1, 0.3} if before else {0.3})


def test_a_stage_that_begins_again_resumes_too(tmp_path):
    make(tmp_path)
    begun = opened(tmp_path, restart=True)
    begun.prepare()
    save(begun, 3)
    assert opened(tmp_path).resumes


def test_a_damaged_manifest_of_the_only_state_is_quarantined(tmp_path, caplog):
    begun = opened(tmp_path)
    begun.prepare()
    save(begun, 3)
    (begun.place / "left").write_text("x")
    os.truncate(begun.place / "state" / "step-00000003" / "manifest.json", 10)
    again = opened(tmp_path)
    again.prepare()
    assert [path.name for path in (again.place / "state").iterdir()] == ["quarantine-step-00000003"]
    assert not (again.place / "left").exists()
    assert "is damaged (manifest.json" in caplog.text


def test_a_stage_of_a_version_that_knew_fewer_settings_is_reused(tmp_path):
    make(tmp_path)
    file = tmp_path / "stages" / "sft" / "done.json"
    done = json.loads(file.read_text())
    older = {name: value for name, value in done["content"].items() if name != "results"} | {"version": "0.0.1"}
    file.write_text(json.dumps({"key": "old", "pairs": done["results"], "files": done["files"], "content": older}))
    new = content() | {"stage": {"kind": "sft", "rate": 0.1, "younger": 3, "nested": {"a": 1}}}

    def found(lean: dict[str, Any]) -> StageFolder:
        stage = StageFolder(
            tmp_path / "stages" / "sft", new, content() | {"stage": {"kind": "sft", "rate": 0.1, **lean}}
        )
        stage.check()
        return stage

    assert found({}).whole == tmp_path / "stages" / "sft"
    assert found({}).key == "old"
    assert (found({"younger": 3}).whole, found({"younger": 3}).why) == (None, "younger null -> 3")
    new["results"] = 2
    assert (found({}).whole, found({}).why) == (None, "results 1 -> 2")


class Killer:
    """Ends the process at the n-th rename, before it, or right after it."""

    def __init__(self, at: int, after: bool) -> None:
        self.at, self.after, self.calls, self.real = at, after, 0, os.rename

    def __call__(self, source: Any, target: Any) -> None:
        self.calls += 1
        if self.calls == self.at and not self.after:
            raise Died
        self.real(source, target)
        if self.calls == self.at:
            raise Died


def died_at(monkeypatch: pytest.MonkeyPatch, run: Path, rate: float, restart: bool, killer: Killer) -> bool:
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killer)
        try:
            make(run, rate, restart)
        except Died:
            return True
    return False


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("wish", [0.1, 0.2, 0.3])
@pytest.mark.parametrize(("doing", "restart"), [(0.3, False), (0.1, False), (0.2, True)])
def test_death_at_any_rename_loses_nothing(tmp_path, monkeypatch, doing, restart, wish, after):
    """0.2 is finished, 0.1 is kept; a run makes 0.3, takes 0.1 back or begins 0.2 again, and the next wants any."""
    start = tmp_path / "start"
    make(start, 0.1)
    make(start, 0.2)
    at, deaths, died = 0, 0, True
    while died:
        at += 1
        run = Path(shutil.copytree(start, tmp_path / f"run-{at}"))
        died = died_at(monkeypatch, run, doing, restart, Killer(at, after))
        left = whole(run)
        assert 0.2 in left
        assert 0.1 in left or left.get(0.3) == "sft" or (restart and list(left) == [0.2])
        unfinished = new_place(run / "stages" / "sft").exists() and ".sft.new" not in left.values()
        said = make(run, wish, restart=unfinished and wish not in left and wish != doing)
        if not (restart and wish == doing):
            assert (said[-1:] == ["reused"]) == (wish in left and not (unfinished and wish == doing))
        assert whole(run)[wish] == "sft"
        assert len(whole(run)) == 2 or restart
        assert {name for name in names(run) if name.startswith(".")} <= ({".sft.new"} if wish != doing else set())
        deaths += died
    assert deaths >= 2


def test_names(tmp_path):
    assert [stage_of(Path(name)) for name in ("sft", ".sft.new", "sft.1a2b3c4d", "ppo@2.damaged-2")] == [
        "sft", "sft", "sft", "ppo@2",
    ]  # fmt: skip
    for _ in range(2):
        (tmp_path / "sft").mkdir()
        set_aside(tmp_path / "sft", None)
    assert names_of(tmp_path) == ["sft.damaged", "sft.damaged-2"]
    assert [path.name for path in kept_folders(tmp_path / "sft")] == ["sft.damaged", "sft.damaged-2"]


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_that_is_cut_is_damage_and_one_that_is_gone_is_not(tmp_path):
    found = opened(tmp_path)
    found.prepare()
    for step in (1, 2):
        (found.place / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (found.place / "checkpoints" / f"step-{step}" / "weights").write_text("long")
    fill(found, 0.1)
    found.finish({}, COST, {}, 1, print)
    os.truncate(tmp_path / "stages" / "sft" / "checkpoints" / "step-2" / "weights", 2)
    with pytest.raises(Damaged, match=r"step-2/weights: 2 of 4 bytes; checkpoints/step-2 as a whole can be removed"):
        opened(tmp_path)
    shutil.rmtree(tmp_path / "stages" / "sft" / "checkpoints" / "step-2")
    assert make(tmp_path) == ["reused"]
