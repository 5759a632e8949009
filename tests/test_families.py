"""The recipes of known models: each fits the machine it is written for, by the model's public shape alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlhf.cli import main
from rlhf.recipe.devices import named_device
from rlhf.recipe.dtype import Here, decide
from rlhf.recipe.fit import Shapes, check_memory
from rlhf.recipe.load import load_recipe
from rlhf.recipe.model_shape import read_shape
from rlhf.recipe.placement import place
from tests.placeholder_weights import placeholder_weights

ROOT = Path(__file__).parents[1]
FAMILIES = ROOT / "recipes" / "families"
SHAPES = ROOT / "tests" / "recipe" / "shapes"
# recipe -> shape, parameters as the model's own page or index file says, GPU, how many of them
SETUPS = {
    "chat": ("qwen2.5-0.5b", 494_032_768, "l4-24gb", 1),
    "qwen2.5-1.5b": ("qwen2.5-1.5b", 1_543_714_304, "rtx4090-24gb", 1),
    "llama3.2-1b": ("llama-3.2-1b", 1_235_814_400, "l4-24gb", 1),
    "qwen2.5-7b": ("qwen2.5-7b", 7_615_616_512, "h100-80gb", 1),
    "mistral-7b": ("mistral-7b", 7_248_023_552, "a100-80gb", 1),
    "llama3.1-8b-8gpu": ("llama-3.1-8b", 8_030_261_248, "a100-80gb", 8),
    "qwen2.5-32b-8gpu": ("qwen2.5-32b", 32_763_876_352, "h100-80gb", 8),
    "llama3.1-70b-2nodes": ("llama-3.1-70b", 70_553_706_496, "h100-80gb", 16),
}


@pytest.fixture
def model(tmp_path):
    """Return a maker of model folders that hold a shape and no weights."""

    def make(shape: str) -> Path:
        folder = Path(shutil.copytree(SHAPES / shape, tmp_path / shape))
        placeholder_weights(folder / "model.safetensors", 10**11)
        return folder

    return make


def test_every_recipe_of_the_folder_has_a_machine():
    assert {path.stem for path in FAMILIES.glob("*.yaml")} == set(SETUPS)


@pytest.mark.parametrize("name", SETUPS)
def test_it_fits(name):
    shape_name, parameters, gpu, count = SETUPS[name]
    recipe = decide(load_recipe(FAMILIES / f"{name}.yaml").recipe, Here(planned=named_device(gpu))).recipe
    assert recipe.model.precision == "bfloat16"
    shape = read_shape(SHAPES / shape_name)
    assert shape.parameters == parameters
    assert sum(bundle.resources.get("GPU", 0) for bundle in place(recipe)) == count
    fit = check_memory(recipe, Shapes(shape, {}), named_device(gpu))
    assert fit.problems == ()
    assert fit.peak is not None
    assert fit.peak.total > 0.3 * fit.peak.limit  # a machine of a third of the size would not do


def test_the_plan_command_says_so_without_a_network(model):
    override = f"model.path={model('qwen2.5-0.5b')}"
    command = ["plan", str(FAMILIES / "chat.yaml"), "--gpu", "l4-24gb", "--set", override]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert "fullest GPU:" in result.stdout
    assert "494.0M parameters" in " ".join(result.stdout.split())


def test_a_smaller_gpu_is_refused(model):
    override = f"model.path={model('qwen2.5-7b')}"
    command = ["plan", str(FAMILIES / "qwen2.5-7b.yaml"), "--gpu", "l4-24gb", "--set", override]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 4
    assert "on a l4-24gb" in result.stderr
