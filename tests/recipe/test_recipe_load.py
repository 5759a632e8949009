"""What a good recipe becomes: merging, overrides, absolute paths, round trip."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from rlhf.recipe.base import HubData, PathData
from rlhf.recipe.load import load_recipe, resolved_yaml


def stage(loaded, name):
    return next(stage for stage in loaded.recipe.stages if stage.name == name)


def test_paths_are_absolute_and_the_source_is_kept(folder, text):
    loaded = folder.load(text)
    assert loaded.path == folder.path / "recipe.yaml"
    assert loaded.folder == folder.path
    assert loaded.text == text
    assert stage(loaded, "sft").data.path == folder.path / "data/sft.jsonl"
    assert stage(loaded, "pairs").judge.path == f"{folder.path / 'rewards.py'}:score"
    assert loaded.recipe.model.path == "tiny://llama"
    assert loaded.recipe.output_dir == Path("runs")


def test_a_recipe_is_frozen(folder):
    with pytest.raises(ValidationError, match="frozen"):
        folder.load().recipe.seed = 3


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gguf://pkg/m.gguf", "gguf://pkg/m.gguf"),
        ("org/model", "org/model"),
        ("models/mine", "{folder}/models/mine"),
        ("./models/mine", "{folder}/models/mine"),
        ("models/../models/mine", "{folder}/models/mine"),
        ("{folder}/models/mine", "{folder}/models/mine"),
    ],
)
def test_model_path(folder, text, path, expected):
    folder.write("models/mine/config.json", "{}")
    path, expected = (item.format(folder=folder.path) for item in (path, expected))
    assert folder.load(text.replace("tiny://llama", path)).recipe.model.path == expected


def test_numbers_follow_yaml_1_2(folder, text):
    recipe = folder.load(text + "seed: 017\ntuning: {kind: lora, alpha: 1e-5, target_modules: [yes, no]}\n").recipe
    assert recipe.seed == 17
    assert recipe.tuning.alpha == 1e-5
    assert recipe.tuning.target_modules == ["yes", "no"]


def test_anchors_merge_keys_and_a_byte_order_mark(folder, text):
    text = text.replace("    init: sft\n", "    init: sft\n    optimizer: &opt {learning_rate: 3, warmup_steps: 2}\n")
    text = text.replace("    steps: 3\n", "    steps: 3\n    optimizer: {<<: *opt, learning_rate: 4}\n")
    optimizer = stage(folder.load("\ufeff" + text), "ppo").optimizer
    assert (optimizer.learning_rate, optimizer.warmup_steps) == (4, 2)


def test_a_merged_key_keeps_the_position_of_its_anchor(folder, text):
    text = text.replace("    init: sft\n", "    init: sft\n    optimizer: &opt {warmup_steps: 2}\n")
    text = text.replace("    steps: 3\n", "    steps: 3\n    optimizer: {<<: *opt}\n").replace(
        "steps: 2}", "steps: -2}"
    )
    with pytest.raises(Exception, match="warmup_steps") as caught:
        folder.load(text)
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == ["recipe.yaml:15:36"]


def test_overrides(folder, text):
    loaded = folder.load(
        text,
        "seed=3",
        "stages.ppo.kl_coef=0.05",
        "stages.ppo.optimizer.learning_rate=1e-3",
        "stages.duel.candidates=[sft, dpo]",
        "roles.rollout={replicas: 2}",
        "name=a=b".replace("=b", "-b"),
        "stages.ppo.kl_coef=0.06",
    )
    ppo = stage(loaded, "ppo")
    assert loaded.recipe.seed == 3
    assert ppo.kl_coef == 0.06
    assert ppo.optimizer.learning_rate == 1e-3
    assert stage(loaded, "duel").candidates == ["sft", "dpo"]
    assert loaded.recipe.roles.rollout.replicas == 2
    assert loaded.recipe.name == "a-b"


def test_an_override_path_is_relative_to_the_recipe(folder, text, monkeypatch):
    folder.write("recipe.yaml", text)
    folder.write("other.jsonl", "{}\n")
    monkeypatch.chdir(folder.path / "data")
    loaded = load_recipe(Path("../recipe.yaml"), ["stages.sft.data.path=other.jsonl"])
    assert stage(loaded, "sft").data.path == folder.path / "other.jsonl"


def test_extends_merges_deeply_and_stages_by_name(folder, text):
    folder.write("base/base.yaml", text + "tuning: {kind: lora, r: 4, alpha: 8}\n")
    folder.write("base/data/sft.jsonl", "{}\n")
    folder.write("base/data/prompts.jsonl", "{}\n")
    folder.write("base/data/heldout.jsonl", "{}\n")
    folder.write("base/rewards.py", "")
    child = """\
    extends: base/base.yaml
    name: child
    tuning: {r: 2}
    stages:
      - {name: ppo, steps: 9}
      - {name: pairs, prompts: {path: data/prompts.jsonl}}
      - {name: sft, data: {hub: org/set}}
      - {name: again, kind: sft, init: ppo, data: {path: data/sft.jsonl}}
    """
    loaded = folder.load(child)
    recipe = loaded.recipe
    assert (recipe.name, recipe.tuning.r, recipe.tuning.alpha) == ("child", 2, 8)
    assert [item.name for item in recipe.stages] == ["sft", "pairs", "rm", "ppo", "dpo", "duel", "again"]
    assert (stage(loaded, "ppo").steps, stage(loaded, "ppo").prompts_per_step) == (9, 8)
    assert stage(loaded, "sft").data == HubData(hub="org/set")
    assert stage(loaded, "pairs").prompts == PathData(path=folder.path / "data/prompts.jsonl")
    assert stage(loaded, "ppo").prompts.path == folder.path / "base/data/prompts.jsonl"
    assert stage(loaded, "again").data.path == folder.path / "data/sft.jsonl"


def test_another_kind_replaces_instead_of_merging(folder, text):
    folder.write("base.yaml", text)
    child = "extends: base.yaml\nstages: [{name: ppo, reward: {kind: function, path: 'rewards.py:score'}}]\n"
    assert stage(folder.load(child), "ppo").reward.kind == "function"


def test_resolved_yaml_round_trip(folder, text):
    extra = "tuning: {kind: lora, alpha: 1e-5, target_modules: ['yes', 'null', '1e-5', 'a: b', 'ü']}\noutput_dir: x y\n"
    loaded = folder.load(text + extra, "stages.ppo.optimizer.learning_rate=1e-22")
    again = folder.path / "elsewhere/recipe.resolved.yaml"
    folder.write("elsewhere/recipe.resolved.yaml", resolved_yaml(loaded.recipe))
    assert load_recipe(again).recipe == loaded.recipe
    assert resolved_yaml(load_recipe(again).recipe) == resolved_yaml(loaded.recipe)
    assert "kl_coef: 0.02" in again.read_text()
    assert again.read_text().startswith("name: trial\nseed: 17\n")
