"""A run folder keeps the dtype that it began in, on whatever machine the run resumes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
from click.testing import CliRunner

from rlhf.api import Run
from rlhf.cli import main
from rlhf.recipe.products import Products
from rlhf.run_folder import kept_dtype
from tests.chaos._small_run import RECIPE, go, in_this_process, interrupt, recorded_step, write_recipe
from tests.chaos.finished import finished

FAST, SLOW = Products(2e11, 1e11, True), Products(2e9, 1e11, False)
TWO = RECIPE.replace(", dtype: float32", "").partition("  - {name: dpo")[0]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    write_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_text(TWO)
    with in_this_process():
        yield tmp_path / "run"


@contextmanager
def cpu(products: Products) -> Iterator[None]:
    with patch("rlhf.recipe.dtype.cpu_products", lambda: products):
        yield


def dtypes(folder: Path) -> tuple[str | None, list[str]]:
    """Return the dtype of the run folder, and those that its finished stages were made in."""
    files = [folder / "stages" / name / "done.json" for name in ("sft", "pairs")]
    done = [json.loads(file.read_text()) for file in files if file.is_file()]
    return kept_dtype(folder), [each["content"]["dtype"] for each in done]


def log(folder: Path) -> str:
    file = folder / "logs" / "run.log"
    return file.read_text() if file.is_file() else ""


@pytest.mark.parametrize(
    ("here", "elsewhere", "dtype"), [(SLOW, FAST, "float32"), (FAST, SLOW, "bfloat16")], ids=["float32", "bfloat16"]
)
def test_a_run_keeps_its_dtype_on_another_machine(folder, here, elsewhere, dtype):
    assert kept_dtype(folder) is None
    with cpu(here), recorded_step("sft", 2, interrupt):
        assert go(folder).code == 130
    assert dtypes(folder) == (dtype, [])
    assert f"the run keeps {dtype}" not in log(folder)
    with cpu(elsewhere):
        assert go(folder).code == 0
    assert dtypes(folder) == (dtype, [dtype] * 2)
    assert f"the run keeps {dtype}, in which it began" in log(folder)
    before = finished(folder)
    with cpu(here):
        assert go(folder).code == 0
    assert finished(folder) == before
    config = json.loads((Run(folder).stages["sft"].model / "config.json").read_text())
    assert config["dtype"] == dtype


def test_auto_and_what_it_is_have_the_same_keys(folder):
    with cpu(FAST):
        assert go(folder, "--set", "model.dtype=bfloat16").code == 0
        before = finished(folder)
        assert go(folder).code == 0
    assert finished(folder) == before


def test_another_dtype_must_be_asked_for_and_then_stays(folder):
    with cpu(FAST):
        assert go(folder).code == 0
    with cpu(SLOW):
        assert go(folder).code == 0
        assert dtypes(folder) == ("bfloat16", ["bfloat16"] * 2)
        assert go(folder, "--set", "model.dtype=float32").code == 0
        assert dtypes(folder) == ("float32", ["float32"] * 2)
    with cpu(FAST):
        assert go(folder).code == 0
        assert dtypes(folder) == ("float32", ["float32"] * 2)


def test_a_refused_run_does_not_change_it(folder):
    with cpu(FAST):
        assert go(folder).code == 0
        refused = ("--set", "model.dtype=float32", "--set", "stages.pairs.max_prompt_tokens=1000000")
        assert go(folder, *refused).code == 2
    assert kept_dtype(folder) == "bfloat16"


@pytest.mark.parametrize("text", ["", "{", "model: 1", "name: t\nmodel: {path: m}\nstages: []"])
def test_a_folder_whose_recipe_cannot_be_read_keeps_nothing(folder, text):
    folder.mkdir()
    (folder / "recipe.resolved.yaml").write_text(text)
    assert kept_dtype(folder) is None


def test_plan_says_what_run_would_do(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with cpu(SLOW):
        assert CliRunner().invoke(main, ["run", "recipe.yaml"]).exit_code == 0
    with cpu(FAST):
        said = CliRunner().invoke(main, ["plan", "recipe.yaml"])
        elsewhere = CliRunner().invoke(main, ["plan", "recipe.yaml", "--set", "name=new"])
    assert "parameters in float32" in said.stdout
    assert "the run keeps float32" in " ".join(said.stdout.split())
    assert "parameters in bfloat16" in elsewhere.stdout


@pytest.mark.parametrize("command", ["plan", "validate", "run"])
def test_bfloat16_on_a_slow_cpu_is_a_warning(folder, command):
    options = ["--output", str(folder)] if command == "run" else []
    arguments = [command, str(folder.parent / "recipe.yaml"), "--set", "model.dtype=bfloat16", *options]
    with cpu(SLOW):
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    said = " ".join((result.stdout + result.stderr).split())
    assert "warning: model.dtype: bfloat16 for policy, rollout: bfloat16 products are 50 times slower" in said
    with cpu(FAST):
        assert "slower" not in CliRunner().invoke(main, arguments).output


def test_validate_measures_nothing_that_it_need_not(folder):
    def measured() -> Products:
        raise AssertionError

    with patch("rlhf.recipe.dtype.cpu_products", measured):
        for dtype in ("auto", "float32"):
            arguments = ["validate", str(folder.parent / "recipe.yaml"), "--set", f"model.dtype={dtype}"]
            assert CliRunner().invoke(main, arguments).exit_code == 0
