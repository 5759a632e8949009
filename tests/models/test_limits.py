"""A model that asks for more than it holds is refused in one line, before work or memory follow what it claims."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from rlhf.cli import main
from rlhf.errors import RecipeError
from rlhf.models.folder import check_folder
from rlhf.models.gguf import locate_gguf
from rlhf.models.gguf_header import check_gguf
from rlhf.models.limits import KNOWN, check_config, largest, read_json
from rlhf.models.loading import load_causal
from rlhf.models.outline import outline
from rlhf.recipe.model_shape import read_shape
from tests.chaos._hostile_models import Place
from tests.chaos._hostile_sizes import ATTEMPTS, GROWTH, within
from tests.conftest import REAL_MODEL


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change(folder: Path, **entries: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 20_000, "num_hidden_layers must be from 1 to 1000, not 20000"),
        ("num_hidden_layers", 0, "must be from 1 to 1000"),
        ("num_hidden_layers", 10**300, "must be from 1 to 1000, not 1000000"),
        ("max_position_embeddings", "2048", 'must be a whole number from 1 to 134217728, not "2048"'),
        ("max_position_embeddings", 10**12, "must be from 1 to 134217728"),
        ("hidden_size", True, "hidden_size must be a whole number from 1 to 262144, not true"),
        ("hidden_size", 64.0, "must be a whole number"),
        ("hidden_size", float("nan"), "must be a whole number"),
        ("vocab_size", -1, "must be from 1 to 4194304"),
        ("intermediate_size", [128, 10**9], "must be from 1 to 2097152"),
        ("num_labels", 10**9, "num_labels must be from -1 to 1048576"),
        ("text_config", {"n_layers": 10**6}, "n_layers must be from 1 to 1000"),
        ("decoder", {"mlp": [{"block_size": 10**12}]}, "block_size must be from -1 to"),
    ],
)
def test_sizes_are_whole_numbers_within_limits(folder: Path, key: str, value: Any, said: str) -> None:
    change(folder, **{key: value})
    with pytest.raises(RecipeError) as caught:
        check_folder(folder, "model.path: x")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400


def test_layers_of_experts_are_counted_together() -> None:
    check_config({"num_hidden_layers": 61, "n_routed_experts": 384}, Path("c"), "x")
    with pytest.raises(RecipeError, match="1000 layers of 4096 experts"):
        check_config({"num_hidden_layers": 1000, "num_local_experts": 4096}, Path("c"), "x")


@pytest.mark.parametrize("shape", sorted((Path(__file__).parents[1] / "recipe/shapes").iterdir()), ids=lambda p: p.name)
def test_models_in_use_are_within_the_limits(shape: Path) -> None:
    check_config(json.loads((shape / "config.json").read_text()), shape, "x")


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": None, "sliding_window": None, "head_dim": None, "layer_types": ["full"] * 61},
        {"max_position_embeddings": 10_485_760, "vocab_size": 262_208, "max_window_layers": 70, "n_inner": None},
        {"time_step_limit": [0.0, float("inf")], "rope_scaling": {"factor": 32.0}, "layer_norm_eps": 1e-5},
        {"num_key_value_heads": [3, 4, 5], "no_rope_layers": [0, 1], "attention_window_size": -1, "num_experts": 0},
    ],
)
def test_what_real_configs_hold_is_taken(config: dict[str, Any]) -> None:
    check_config(config, Path("c"), "x")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_large_files_are_not_read(folder: Path, name: str) -> None:
    limit = largest(name)
    assert limit is not None
    (folder / name).touch()
    os.truncate(folder / name, limit + 1)
    with pytest.raises(RecipeError, match=rf"{name} has {limit + 1} bytes; {limit // 2**20} MiB is the most we read"):
        check_folder(folder, "x")
    if name.endswith(".json"):
        with pytest.raises(RecipeError, match="the most we read"):
            read_json(folder / name, "x")


@pytest.mark.parametrize("depth", [33, 900, 10**5])
def test_deep_files_are_refused(folder: Path, depth: int) -> None:
    (folder / "config.json").write_text('{"x": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(RecipeError, match=r"config\.json is (nested|not JSON)"):
        check_folder(folder, "x")


def test_a_header_that_promises_what_its_file_lacks_is_found_before_a_run(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RecipeError, match=r"model\.safetensors: cannot be loaded: SafetensorError"):
        check_folder(folder, "x")


@pytest.mark.parametrize("use", [read_shape, lambda folder: load_causal(folder, "float32")])
def test_a_config_of_a_larger_model_is_refused_before_memory_is_taken(folder: Path, use: Callable[[Path], Any]) -> None:
    change(folder, hidden_size=2**15, intermediate_size=2**17, num_hidden_layers=100)
    with pytest.raises(RecipeError, match=r"describes a model of \d+ weights, and its files hold \d+ at most"):
        use(folder)


def test_weights_of_other_shapes_are_one_line(folder: Path) -> None:
    change(folder, intermediate_size=256)
    with pytest.raises(RecipeError, match="cannot be loaded: RuntimeError"):
        load_causal(folder, "float32")


def test_an_outline_without_weights_is_only_that(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    change(folder, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    _, model = outline(folder)
    assert sum(one.numel() for one in model.parameters()) > 10**9
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match="not of one model"):
        outline(folder)


def test_a_plan_says_so_with_the_exit_code_of_a_recipe(folder: Path, tmp_path: Path) -> None:
    change(folder, num_hidden_layers=20_000)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "r.yaml").write_text(
        f"name: t\nmodel: {{path: '{folder}', dtype: float32}}\n"
        "stages:\n  - {name: sft, kind: sft, data: {path: rows.jsonl}}\n"
    )
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml")])
    assert result.exit_code == 2
    assert "num_hidden_layers must be from 1 to 1000, not 20000" in " ".join(result.output.split())


@pytest.mark.parametrize("attempt", ATTEMPTS, ids=lambda attempt: attempt.__name__)
def test_each_kind_of_hostile_model(attempt: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """A few of each kind that `make chaos` counts: an error for people, or nothing of note."""
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        place = Place(tmp_path / str(number), tmp_path / "marker", tiny_folder, random.Random(number))
        try:
            assert attempt(place) == []
        except RecipeError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / "marker").exists()


def test_growth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def grows(place: Place) -> list[str]:
        return []

    peaks = iter((0, GROWTH + 1))
    monkeypatch.setattr("tests.chaos._hostile_sizes.peak", lambda: next(peaks))
    with pytest.raises(MemoryError, match="grows took 512 MiB"):
        within(grows)(None)  # type: ignore[arg-type]


@pytest.mark.real_model
def test_a_gguf_file_in_use_is_counted() -> None:
    assert check_gguf(locate_gguf(REAL_MODEL)) == 134_515_008
