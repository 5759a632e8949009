"""The wheel: what it holds and asks for, and that it works outside the clone with the locked packages alone."""

from __future__ import annotations

import email
import shutil
import zipfile
from pathlib import Path

import pytest
from fresh_environment import ROOT, Fresh, build_wheel, make_environment
from lock_closure import gaps, locked
from packaging.requirements import Requirement
from test_locks import LEFT_OUT, OLDER

EXAMPLE = ROOT / "rlhf" / "starter" / "examples" / "quickstart"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Fresh:
    """The CPU set and the wheel; none of the packages of the tests."""
    return make_environment(tmp_path_factory.mktemp("fresh"), wheel, "cpu", "torch")


def test_it_holds_the_packages_with_their_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    there = {
        path.relative_to(ROOT).as_posix()
        for package in ("rlhf", "actors")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == there


def test_the_example_is_one_copy_of_the_shipped_recipe():
    for file in (path for path in EXAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        assert file.is_symlink()
        assert file.resolve() == ROOT / "recipes" / file.relative_to(EXAMPLE)


def test_the_locks_satisfy_what_it_asks_for(wheel):
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(opened.read(name))
    assert metadata["Name"] == "rlhf-recipe"
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    for extra in metadata.get_all("Provides-Extra", []):
        engine = "gpu" if extra == "gpu" else "cpu"
        lock = locked("gpu", "dev") if extra == "gpu" else locked("cpu", "torch", "dev")
        lock["torch"] += "+cpu" if engine == "cpu" else ""
        wanted = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": extra})]
        assert len(wanted) > 30
        own = {("the project", "rlhf-recipe")} if extra == "dev" else set()  # its own extras
        assert gaps(lock, wanted) - own == LEFT_OUT[engine] | OLDER


def test_the_example_runs_where_there_is_no_clone(fresh, tmp_path):
    """As far as a test may: written, valid with the model that the lock brings, and planned."""
    written = fresh.run("init", "--example", "quickstart", cwd=tmp_path)
    assert written.returncode == 0, written.stderr
    assert written.stdout.endswith("next: rlhf run quickstart/quickstart.yaml\n")
    for file in (path for path in EXAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        assert (tmp_path / "quickstart" / file.relative_to(EXAMPLE)).read_bytes() == file.read_bytes()
    checked = fresh.run("validate", "quickstart/quickstart.yaml", cwd=tmp_path)
    assert checked.stdout == "OK quickstart: sft -> pairs -> rm -> ppo -> dpo -> duel\n", checked.stderr


def test_what_is_missing_is_named_as_a_wheel_installs_it(fresh, tmp_path):
    """bitsandbytes is not in the CPU set."""
    fresh.run("init", "--example", "quickstart", cwd=tmp_path)
    recipe = ("quickstart/quickstart.yaml", "--set", "stages.sft.tuning={kind: qlora}")
    refused = fresh.run("validate", *recipe, cwd=tmp_path)
    assert refused.returncode == 2
    assert "pip install 'rlhf-recipe[qlora]'" in refused.stderr


@pytest.mark.ray
def test_the_smoke_pipeline_runs_through_ray_outside_the_clone(fresh, tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    ran = fresh.run("run", "recipes/smoke/pipeline.yaml", cwd=tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "runs" / "smoke" / "report.html").is_file()
