"""The command line: exit codes, messages, and how light it is to import."""

import json
import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

import rlhf
from rlhf.cli import main

RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
stages:
  - name: sft
    kind: sft
    data: {path: sft.jsonl}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def invoke(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_help_is_light():
    code = (
        "import sys\nfrom rlhf.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "print('MODULES', *{name.split('.')[0] for name in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for command in ("run", "validate", "plan", "schema"):
        assert f"\n  {command} " in out
    loaded = set(out.split("MODULES")[1].split())
    assert not loaded & {
        "torch",
        "transformers",
        "ray",
        "vllm",
        "actors",
        "pydantic",
        "ruamel",
        "datasets",
        "numpy",
        "rich",
    }


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.output) == (0, f"rlhf, version {rlhf.__version__}\n")


def test_validate(recipe):
    result = invoke("validate", "recipe.yaml", "--set", "seed=3")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "OK trial: sft\n", "")


@pytest.mark.parametrize("command", ["run", "validate", "plan"])
@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "kind: sft",
            "kind: sft\n    epohcs: 1",
            "recipe.yaml:6:5: stages.sft.epohcs: unknown key (did you mean epochs?)",
        ),
        (
            "kind: sft",
            "kind: sft\n    epochs: x",
            "recipe.yaml:6:13: stages.sft.epochs: must be a whole number, got 'x'",
        ),
        ("kind: sft", "kind: sft\n    kind: dpo", 'recipe.yaml:6:5: not valid YAML: found duplicate key "kind"'),
        ("sft.jsonl", "stf.jsonl", "recipe.yaml:6:18: stages.sft.data.path: file not found: stf.jsonl"),
        ("kind: sft", "kind: sft\n    init: stf", "recipe.yaml:6:11: stages.sft.init: no stage is named 'stf'"),
        (
            "name: trial",
            "extends: recipe.yaml",
            "recipe.yaml:1:10: extends: recipe.yaml extends this recipe again, a cycle",
        ),
        ("stages:", "stages: }", "recipe.yaml:3:9: not valid YAML: expected the node content, but found '}'"),
        (RECIPE, "", "recipe.yaml:1:1: the recipe is empty"),
    ],
)
def test_bad_recipes_end_every_command_with_2(recipe, command, old, new, expected):
    recipe.write_text(RECIPE.replace(old, new, 1))
    result = invoke(command, "recipe.yaml")
    assert (result.exit_code, result.stderr, result.stdout) == (2, f"error: {expected}\n", "")


@pytest.mark.parametrize("command", ["run", "validate", "plan"])
def test_bad_override_missing_file_and_bytes(recipe, command):
    result = invoke(command, "recipe.yaml", "--set", "stages.sft.epohcs=1")
    expected = "error: --set stages.sft.epohcs: unknown key (did you mean epochs?)\n"
    assert (result.exit_code, result.stderr) == (2, expected)
    result = invoke(command, "other.yaml")
    assert (result.exit_code, result.stderr) == (2, "error: other.yaml: recipe not found\n")
    recipe.write_bytes(b"name: \xfe\n")
    result = invoke(command, "recipe.yaml")
    assert (result.exit_code, result.stderr) == (2, "error: recipe.yaml:1:7: not UTF-8 text (byte 0xfe)\n")


def test_many_problems_are_at_most_six_lines_without_traceback(recipe):
    recipe.write_text("".join(f"key{number}: 1\n" for number in range(30)) + RECIPE)
    result = invoke("validate", recipe)
    assert len(result.stderr.splitlines()) == 6
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(recipe):
    result = invoke("validate", "other.yaml", "--debug")
    assert result.exit_code == 2
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("error: other.yaml: recipe not found\n")


@pytest.mark.parametrize("arguments", [["validate"], ["nothing"], ["run", "a", "b"], ["run", "recipe.yaml", "--locla"]])
def test_usage_errors_end_with_2(recipe, arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


def test_output_must_not_be_a_file(recipe):
    result = invoke("run", "recipe.yaml", "--output", "sft.jsonl")
    assert result.exit_code == 2
    assert "'sft.jsonl' is a file" in result.stderr


def test_what_does_not_fit_ends_with_4(recipe):
    many = ("--set", "roles.policy.ranks=1000", "--set", "roles.policy.gpus=1")
    for command in ("run", "plan"):
        result = invoke(command, "recipe.yaml", *many)
        assert result.exit_code == 4
        assert result.stderr.startswith("error: the recipe wants 1000 gpus: policy 1000 (for sft); ")
    assert not (recipe.parent / "runs").exists()


def test_interrupt_ends_with_130(recipe, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.recipe.load.load_recipe", interrupted)
    result = invoke("validate", "recipe.yaml")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_plan_for_people_and_programs(recipe):
    result = invoke("plan", "recipe.yaml")
    assert result.exit_code == 0
    headline = r"trial: sft; on Ray: policy CPU; roughly \d+ min( at the speed that other programs leave)?\n"
    assert re.match(headline, result.stdout)
    plan = json.loads(invoke("plan", "recipe.yaml", "--json").stdout)
    cores = len(os.sched_getaffinity(0))
    assert [(role["role"], role["threads"]) for role in plan["stages"][0]["roles"]] == [("policy", cores)]
    assert plan["stages"][0]["schedule"]["rows"] == 1


def test_schema_describes_the_recipe():
    result = invoke("schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    assert set(schema["required"]) == {"name", "model", "stages"}
    assert re.search(r"file\.py:function", result.stdout)
