"""What `rlhf checkpoint list` and `verify` say of a run folder."""

import json
import os
import shutil
from pathlib import Path

from click.testing import CliRunner

from rlhf.checkpoint import newest, seal
from rlhf.cli import main
from tests.small_states import fill, names, save


def run_folder(tmp_path: Path) -> Path:
    stage = tmp_path / "run" / "stages" / "ppo"
    for step in (1, 2):
        save(stage / "state", step)
    model = tmp_path / "run" / "stages" / "sft" / "model"
    model.mkdir(parents=True)
    fill(model)
    done = {"key": "k", "content": {"stage": {"kind": "sft"}}}
    (model.parent / "done.json").write_text(json.dumps(done | {"files": seal(model)}))
    (tmp_path / "run" / "stages" / "pairs").mkdir()
    (tmp_path / "run" / "stages" / "pairs" / "done.json").write_text(json.dumps(done))
    return tmp_path / "run"


def invoke(*arguments):
    return CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])


def test_verify_counts_what_is_whole_and_names_what_is_not(tmp_path):
    run = run_folder(tmp_path)
    result = invoke("verify", run)
    assert (result.exit_code, result.output) == (0, "OK 2 states, 1 models\n")
    (run / "stages" / "sft" / "model" / "empty").unlink()
    (run / "stages" / "ppo" / "state" / "step-00000001" / "sub" / "abc").write_bytes(b"xyz")
    result = invoke("verify", run)
    assert result.exit_code == 3
    assert result.stderr.splitlines() == [
        "error: stages/ppo/state/step-00000001/sub/abc: changed",
        "stages/sft/model/empty: missing",
    ]
    for number in range(9):
        (run / "stages" / "sft" / "model" / str(number)).touch()  # what nobody has sealed is no damage
    assert invoke("verify", run).stderr == result.stderr
    for step in range(3, 12):
        os.truncate(save(run / "stages" / "ppo" / "state", step).folder / "sub" / "abc", 1)
    lines = invoke("verify", run).stderr.splitlines()
    assert len(lines) == 6
    assert lines[-1] == "and 6 more"
    shutil.rmtree(run / "stages" / "ppo")
    (run / "stages" / "sft" / "done.json").write_text("{")
    assert "stages/sft/done.json: truncated or damaged" in invoke("verify", run).stderr


def test_list_shows_every_state(tmp_path):
    run = run_folder(tmp_path)
    root = run / "stages" / "ppo" / "state"
    (root / "step-00000002" / "empty").unlink()
    assert newest(root).step == 1
    os.truncate(save(root, 3).folder / "sub" / "abc", 1)
    result = invoke("list", run)
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "ppo" in line]
    assert [(row[1], row[4]) for row in rows] == [
        ("1", "valid"),
        ("2", "quarantined"),
        ("3", "sub/abc: truncated: 1 of 3 bytes"),
    ]
    assert names(root) == ["quarantine-step-00000002", "step-00000001", "step-00000003"]


def test_list_says_that_there_is_nothing(tmp_path):
    result = invoke("list", tmp_path)
    assert (result.exit_code, result.output) == (0, f"no states in {tmp_path}\n")
    assert invoke("list", tmp_path / "absent").exit_code == 2
