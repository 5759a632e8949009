"""Keys of stages: they change with everything that bears on a result, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rlhf.fingerprint import RESULTS, completed, content_key, file_digest, folder_digest, stage_content, upstream
from rlhf.recipe.load import load_recipe
from rlhf.stage_run import STAGES

RECIPE = """\
name: trial
model: {path: "tiny://llama", dtype: float32}
roles: {rollout: {engine: transformers}}
stages:
  - {name: sft, kind: sft, data: {path: data/sft.jsonl}}
  - name: pairs
    kind: annotate
    policy: sft
    prompts: {path: data/prompts.jsonl}
    judge: {kind: function, path: "rewards.py:score"}
  - {name: rm, kind: reward, init: base, data: {stage: pairs}, gold: {kind: function, path: "gold.py:score"}}
  - {name: ppo, kind: ppo, policy: sft, reward: {kind: model, stage: rm}, prompts: {path: data/ppo.jsonl}, steps: 3}
  - {name: dpo, kind: dpo, policy: sft, data: {path: data/pairs.jsonl}}
  - name: duel
    kind: compare
    candidates: [sft, ppo, dpo]
    baseline: sft
    prompts: {path: data/heldout.jsonl}
    gold: {kind: function, path: "gold.py:score"}
    reward: {kind: model, stage: rm}
"""
FILES = ("data/sft.jsonl", "data/prompts.jsonl", "data/ppo.jsonl", "data/pairs.jsonl", "data/heldout.jsonl")
ALL = {"sft", "pairs", "rm", "ppo", "dpo", "duel"}


def write(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    for name in (*FILES, "rewards.py", "gold.py"):
        (folder / name).write_text(f"# {name}\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "here")


def keys(folder: Path, *overrides: str, base: str = "b") -> dict[str, str]:
    """Return the key of every stage, in the way a run works them out."""
    recipe = load_recipe(folder / "recipe.yaml", overrides).recipe
    found = {"base": base}
    for stage in recipe.stages:
        found[stage.name] = content_key(stage_content(stage, recipe, found))
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() - {"base"} if before[name] != after[name]}


def contents(folder: Path, stage: str, *overrides: str) -> tuple[dict, dict]:
    """Return the content of a stage, and the same without what stands at its default."""
    recipe = load_recipe(folder / "recipe.yaml", overrides).recipe
    found = dict.fromkeys(("base", *ALL), "k")
    (one,) = (one for one in recipe.stages if one.name == stage)
    return stage_content(one, recipe, found), stage_content(one, recipe, found, exclude_defaults=True)


def test_every_kind_has_a_number_of_its_results_and_no_key_holds_a_version(folder, monkeypatch):
    assert RESULTS.keys() == STAGES.keys()
    before = keys(folder)
    monkeypatch.setattr("rlhf.__version__", "99")
    assert keys(folder) == before
    monkeypatch.setitem(RESULTS, "reward", 2)
    assert changed(before, keys(folder)) == {"rm", "ppo", "duel"}


@pytest.mark.parametrize("stage", sorted(ALL))
def test_a_setting_that_an_older_version_did_not_have_stood_at_its_default(folder, stage):
    new, lean = (content | {"results": 1} for content in contents(folder, stage))
    old = new | {"version": "0.1.0", "stage": lean["stage"], "tuning": lean["tuning"]}
    del old["results"]
    assert completed(old, new, lean) == new
    assert completed(old | {"seed": 18}, new, lean) != new
    assert completed(old | {"stage": lean["stage"] | {"gone": 1}}, new, lean) != new
    assert completed(old, new | {"results": 2}, lean | {"results": 2}) != new | {"results": 2}


def test_a_setting_that_is_given_is_not_what_an_older_version_did(folder):
    old, _ = contents(folder, "dpo")
    for override in ("stages.dpo.beta=0.5", "stages.dpo.optimizer.warmup_steps=3", "tuning={kind: full}"):
        new, lean = contents(folder, "dpo", override)
        less = old | {"stage": {name: value for name, value in old["stage"].items() if name not in ("beta",)}}
        assert completed(less, new, lean) != new, override


def test_how_fast_a_judge_must_be_is_no_part_of_a_key_nor_was_it_of_an_older_one(folder):
    new, lean = contents(folder, "pairs")
    assert contents(folder, "pairs", "stages.pairs.judge.timeout_s=7", "stages.pairs.judge.workers=3")[0] == new
    judge = new["stage"]["judge"] | {"timeout_s": 60.0}
    assert completed(new | {"stage": new["stage"] | {"judge": judge}}, new, lean) == new


def test_keys_are_stable_and_no_two_stages_share_one(folder):
    assert keys(folder) == keys(folder)
    assert len(set(keys(folder).values())) == len(ALL) + 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=18", ALL),
        ("model.dtype=bfloat16", ALL),
        ("tuning={kind: lora, r: 4}", ALL),
        ("tuning={kind: full}", ALL),
        ("stages.sft.optimizer.learning_rate=0.5", ALL),
        ("stages.sft.data.limit=3", ALL),
        ("stages.pairs.label_noise=0.2", {"pairs", "rm", "ppo", "duel"}),
        ("stages.rm.epochs=2", {"rm", "ppo", "duel"}),
        ('stages.rm.gold.path="gold.py:other"', {"rm", "ppo", "duel"}),
        ("stages.ppo.kl_coef=0.5", {"ppo", "duel"}),
        ("stages.ppo.agreement.tolerance=0.3", {"ppo", "duel"}),
        ("stages.dpo.beta=0.5", {"dpo", "duel"}),
        ("stages.duel.bootstrap_samples=9", {"duel"}),
        ("budget={gradient_tokens: 9}", {"ppo", "dpo", "duel"}),
        ("stages.dpo.seed=3", {"dpo", "duel"}),
        ("roles.rollout.engine=vllm", {"pairs", "rm", "ppo", "duel"}),
    ],
)
def test_a_setting_changes_its_stage_and_what_follows(folder, override, expected):
    assert changed(keys(folder), keys(folder, override)) == expected


@pytest.mark.parametrize(
    "override",
    [
        "name=other",
        "output_dir=elsewhere",
        "backend=local",
        "ray.call_timeout_s=9",
        "tracking={wandb: {project: p}}",
        "roles.policy.cpus=2",
        "stages.ppo.samples={every: 5, keep: 3}",
        *(f"stages.{name}.max_tokens_per_microbatch=512" for name in sorted(ALL)),
    ],
)
def test_what_does_not_bear_on_results_changes_no_key(folder, override):
    assert changed(keys(folder), keys(folder, override)) == set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("data/sft.jsonl", ALL),
        ("data/prompts.jsonl", {"pairs", "rm", "ppo", "duel"}),
        ("rewards.py", {"pairs", "rm", "ppo", "duel"}),
        ("gold.py", {"rm", "ppo", "duel"}),
        ("data/ppo.jsonl", {"ppo", "duel"}),
        ("data/pairs.jsonl", {"dpo", "duel"}),
        ("data/heldout.jsonl", {"duel"}),
    ],
)
def test_one_byte_of_a_file_changes_the_stages_that_read_it_and_what_follows(folder, name, expected):
    before = keys(folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-2] + b"?" + data[-1:])
    assert changed(before, keys(folder)) == expected
    (folder / name).write_bytes(data)
    assert keys(folder) == before


def test_another_base_model_changes_every_key(folder):
    assert changed(keys(folder), keys(folder, base="c")) == ALL


def test_two_files_that_swap_contents_change_the_key(folder):
    same = 'stages.ppo.reward={kind: function, path: "rewards.py:score"}'
    gold = 'stages.ppo.gold={kind: function, path: "gold.py:score"}'
    before = keys(folder, same, gold)
    first, second = ((folder / name).read_text() for name in ("rewards.py", "gold.py"))
    (folder / "rewards.py").write_text(second)
    (folder / "gold.py").write_text(first)
    assert "ppo" in changed(before, keys(folder, same, gold))


@pytest.mark.parametrize("place", ["there", "with space", "sché\u4e00ma", 'quo"te', "data"])
def test_keys_do_not_depend_on_where_the_folder_lies(folder, tmp_path, place):
    moved = shutil.copytree(folder, tmp_path / place / "deep")
    assert keys(moved) == keys(folder)


def test_upstream_names_every_stage_that_is_read(folder):
    stages = {stage.name: stage for stage in load_recipe(folder / "recipe.yaml").recipe.stages}
    assert {name: upstream(stage) for name, stage in stages.items()} == {
        "sft": {"base"},
        "pairs": {"sft"},
        "rm": {"base", "pairs"},
        "ppo": {"sft", "rm"},
        "dpo": {"sft"},
        "duel": {"sft", "ppo", "dpo", "rm"},
    }


def test_a_model_folder_is_its_weights_settings_and_tokenizer(tiny_folder, tmp_path):
    copied = shutil.copytree(tiny_folder, tmp_path / "copy")
    before = folder_digest(tiny_folder)
    assert folder_digest(copied) == before
    (copied / "README.md").write_text("notes")
    assert folder_digest(copied) == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        file = copied / name
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert folder_digest(copied) != before
        file.rename(copied / f"{name}.json")
        assert folder_digest(copied) != before
        (copied / f"{name}.json").rename(file)
        file.write_bytes(data)
        assert folder_digest(copied) == before


def test_the_digest_of_a_file_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
