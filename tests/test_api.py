"""The Python API: as small as the command line, and the same runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from click.testing import CliRunner
from nbclient import NotebookClient

import rlhf
from rlhf import Recipe, Run, run
from rlhf.cli import main
from rlhf.errors import DataError, RecipeError

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebook.ipynb"
TEXT = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
roles: {rollout: {engine: transformers}}
stages:
  - {name: sft, kind: sft, data: {path: sft.jsonl}, batch_size: 2, heldout_fraction: 0}
"""


@pytest.fixture(scope="module")
def recipe_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    rows = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(6)]
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(TEXT)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def made(recipe_path):
    recipe = Recipe.load(recipe_path, {"stages.sft.epochs": 2, "stages.sft.optimizer": {"learning_rate": 0.005}})
    return run(recipe, local=True, output=recipe_path.parent / "out", quiet=True)


def test_import_is_light():
    code = (
        "import sys, rlhf; print(*sorted(m for m in sys.modules if '.' not in m)); from rlhf import Recipe, Run, run;"
        "print(run.__name__, Recipe.__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert not {"torch", "transformers", "pydantic", "ray", "click", "rich"} & set(out[0].split())
    assert out[1] == "run Recipe"
    with pytest.raises(AttributeError, match="nothing"):
        _ = rlhf.nothing


def test_a_recipe_is_checked_as_on_the_command_line(recipe_path):
    recipe = Recipe.load(str(recipe_path), {"seed": 3, "tuning": {"kind": "full"}})
    assert (recipe.settings.seed, recipe.settings.tuning.kind) == (3, "full")
    assert "heldout_fraction: 0" in str(recipe)
    with pytest.raises(RecipeError, match=r"stages.sft.epohcs: unknown key \(did you mean epochs\?\)"):
        Recipe.load(recipe_path, {"stages.sft.epohcs": 1})


def test_what_a_run_has_left(made, recipe_path):
    assert made.folder == recipe_path.parent / "out"
    assert list(made.stages) == ["sft"]
    sft = made.stages["sft"]
    assert sft.done
    assert [row["step"] for row in sft.metrics if "loss" in row] == [1, 2, 3, 4, 5, 6]
    frame = sft.frame()
    assert frame["loss"].iloc[-1] < frame["loss"].iloc[0]
    assert sft.summary["rows"] == 6
    assert (sft.model / "config.json").is_file()
    assert (made.comparison, made.report, made.status.state) == (None, None, "done")
    with pytest.raises(KeyError, match="the run has sft"):
        made.stages["ppo"]


def test_it_is_the_run_of_the_command_line(made, recipe_path):
    """Equal settings give equal weights, and a folder made by one is reused by the other."""
    sets = ["--set", "stages.sft.epochs=2", "--set", "stages.sft.optimizer={learning_rate: 0.005}"]
    command = ["run", str(recipe_path), "--local", "--output", str(made.folder), *sets]
    assert "unchanged, reused" in CliRunner().invoke(main, command).stdout


def test_a_run_is_opened_again(made):
    again = Run(str(made.folder))
    assert again.stages["sft"].metrics == made.stages["sft"].metrics
    assert repr(again) == f"Run('{made.folder}')"
    with pytest.raises(DataError, match="no run folder"):
        Run(made.folder.parent)


def test_an_unfinished_stage_has_no_model_yet(made, tmp_path):
    folder = tmp_path / "half"
    (folder / "stages" / "sft" / "model").mkdir(parents=True)
    (folder / "recipe.resolved.yaml").write_text((made.folder / "recipe.resolved.yaml").read_text())
    stage = Run(folder).stages["sft"]
    assert (stage.done, stage.model, stage.adapter, stage.metrics, stage.summary) == (False, None, None, [], {})


def test_the_notebook_runs():
    """The smoke pipeline, all of it, from its start to the table of the comparison."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    stored = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert stored == []
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    )
    client.execute()
    printed = "\n".join(
        output.get("text", "") or output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert "gold" in printed
    for name in ("sft", "ppo", "dpo"):
        assert name in printed
    values = [float(line.split()[1]) for line in printed.splitlines() if line.startswith(("ppo ", "dpo ", "sft "))]
    assert len(values) >= 3
    assert all(math.isfinite(value) for value in values)
