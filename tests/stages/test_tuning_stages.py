"""Tuning methods through whole stages: what they learn and leave, that it is reused, and that damage is found."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import rlhf
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlhf.errors import DataError
from rlhf.local import LocalLauncher
from rlhf.models.tiny import build_tiny
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe_run import run_recipe
from rlhf.report.states import check_run

RECIPES = Path(__file__).parents[2] / "recipes"
RECIPE = load_recipe(RECIPES / "smoke" / "tuning.yaml")
METHODS = [stage.name for stage in RECIPE.recipe.stages[1:]]
MODELS = {"full", "lora", "rslora", "dora", "pissa", "ia3", "layers"}
ADAPTERS = set(METHODS) - {"full", "layers"}


def run(loaded, folder, launcher=LocalLauncher):
    console = Console(record=True, width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        run_recipe(loaded, launcher, folder, console)
    return console.export_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("run")
    run(RECIPE, made)
    return made


def losses(folder, stage):
    lines = (folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def logits(model):
    tokens = torch.randint(6, 262, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -12:]


@pytest.mark.parametrize("method", METHODS)
def test_it_learns(folder, method):
    """The mean of the last epoch (3 steps) is well below that of the first."""
    found = losses(folder, method)
    assert sum(found[-3:]) < (0.95 if method in ("prompt_tuning", "p_tuning") else 0.9) * sum(found[:3])


@pytest.mark.parametrize("method", METHODS)
def test_it_leaves_a_model_an_adapter_or_both(folder, method):
    stage = folder / "stages" / method
    assert (stage / "model" / "config.json").exists() == (method in MODELS)
    assert (stage / "adapter" / "adapter_config.json").exists() == (method in ADAPTERS)
    done = json.loads((stage / "done.json").read_text())
    assert bool(done["files"]) == (method in MODELS)
    assert bool(done["adapter"]) == (method in ADAPTERS)


@pytest.mark.parametrize("method", sorted(ADAPTERS))
def test_the_adapter_loads_on_the_model_it_started_from(folder, method):
    stage = folder / "stages" / method
    config = json.loads((stage / "adapter" / "adapter_config.json").read_text())
    start = config["base_model_name_or_path"]
    assert start == str(folder / "stages" / "start" / "model")
    found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), stage / "adapter"))
    assert not torch.allclose(found, logits(AutoModelForCausalLM.from_pretrained(start)), atol=1e-2)
    if method in MODELS:
        merged = logits(AutoModelForCausalLM.from_pretrained(stage / "model"))
        torch.testing.assert_close(merged, found, rtol=1e-5, atol=2e-5)


def test_finished_stages_are_reused_until_they_are_damaged(folder):
    assert check_run(folder).problems == []
    assert run(RECIPE, folder).count("unchanged, reused") == len(METHODS) + 1
    weights = folder / "stages" / "p_tuning" / "adapter" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert check_run(folder).problems == ["stages/p_tuning/adapter/adapter_model.safetensors: changed"]
    with pytest.raises(DataError, match=r"p_tuning is damaged \(adapter/adapter_model.safetensors: changed\)"):
        run(RECIPE, folder)
    weights.write_bytes(whole)
    assert run(RECIPE, folder).count("unchanged, reused") == len(METHODS) + 1


SHORT = """\
name: short
model: {{path: "{model}", dtype: float32}}
tuning: {tuning}
roles: {{rollout: {{engine: transformers}}}}
stages:
  - name: sft
    kind: sft
    data: {{path: {data}/smoke_sft.jsonl}}
    optimizer: {{learning_rate: 2e-2}}
    heldout_fraction: 0
    batch_size: 8
    epochs: 2
  - name: dpo
    kind: dpo
    policy: sft
    data: {{path: {data}/smoke_pairs.jsonl}}
    optimizer: {{learning_rate: 2e-2}}
  - name: rm
    kind: reward
    init: sft
    data: {{path: {data}/smoke_pairs.jsonl}}
    optimizer: {{learning_rate: 2e-2}}
    epochs: 2
  - name: ppo
    kind: ppo
    policy: sft
    reward: {{kind: model, stage: rm}}
    prompts: {{path: {data}/smoke_prompts.jsonl, limit: 8}}
    steps: 2
    prompts_per_step: 4
    minibatch_size: 4
    max_prompt_tokens: 64
    max_response_tokens: 6
"""


def short(tmp_path, tuning, model="tiny://llama", *overrides):
    path = tmp_path / "short.yaml"
    path.write_text(SHORT.format(tuning=tuning, model=model, data=RECIPES / "data"))
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    "tuning", ["{kind: lora, dora: true}", "{kind: lora, init: pissa}", "{kind: ia3}", "{kind: qlora}"]
)
def test_a_method_goes_through_every_kind_of_stage(tmp_path, tuning):
    run(short(tmp_path, tuning), tmp_path / "run")
    for stage in ("sft", "dpo", "rm", "ppo"):
        left = {path.name for path in (tmp_path / "run" / "stages" / stage).iterdir()}
        assert {"model", "adapter"} <= left
    assert losses(tmp_path / "run", "sft")[-1] < losses(tmp_path / "run", "sft")[0]


@pytest.mark.parametrize("tuning", ["{kind: bitfit}", "{kind: layers, last: 1}"])
def test_plain_weights_too_from_a_model_with_biases(tmp_path, tuning):
    run(short(tmp_path, tuning, qwen(tmp_path)), tmp_path / "run")
    for stage in ("sft", "dpo", "rm", "ppo"):
        left = {path.name for path in (tmp_path / "run" / "stages" / stage).iterdir()}
        assert "model" in left
        assert "adapter" not in left


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning", "p_tuning", "llama_adapter"])
def test_what_cannot_be_merged_trains_on_pairs_and_as_a_critic(tmp_path, kind):
    method = f"{{kind: {kind}}}"
    loaded = short(
        tmp_path, "{kind: full}", "tiny://llama", f"stages.dpo.tuning={method}", f"stages.ppo.critic_tuning={method}"
    )
    run(loaded, tmp_path / "run")
    left = {path.name for path in (tmp_path / "run" / "stages" / "dpo").iterdir()}
    assert "adapter" in left
    assert "model" not in left


@pytest.mark.parametrize(
    ("tuning", "left"),
    [
        ("{kind: ia3}", {"model", "adapter"}),
        ("{kind: lora, dora: true}", {"model", "adapter"}),
        ("{kind: qlora}", {"model", "adapter"}),
        ("{kind: layers, last: 1}", {"model"}),
        ("{kind: p_tuning}", {"adapter"}),
        ("{kind: prefix_tuning}", {"adapter"}),
        ("{kind: llama_adapter}", {"adapter"}),
    ],
)
def test_classifiers_train_by_a_method(tmp_path, tuning, left):
    changes = (f"tuning={tuning}", "stages.kinds.epochs=3", "stages.kinds.optimizer.learning_rate=1e-2")
    run(load_recipe(RECIPES / "smoke" / "classify.yaml", changes), tmp_path)
    stage = tmp_path / "stages" / "kinds"
    assert {name for name in ("model", "adapter") if (stage / name).exists()} == left
    found = losses(tmp_path, "kinds")
    assert sum(found[-3:]) < 0.9 * sum(found[:3])


def qwen(tmp_path):
    """Write a tiny Qwen2 with the tokenizer of the tiny Llama."""
    folder = build_tiny(tmp_path / "qwen")
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=262, num_key_value_heads=1, tie_word_embeddings=True, **size)
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.ray
def test_two_methods_through_ray(tmp_path):
    changes = ["stages.dpo.tuning={kind: ia3}", "stages.ppo.steps=1"]
    loaded = short(tmp_path, "{kind: lora, dora: true, rslora: true}", "tiny://llama", *changes)
    rlhf("run", loaded.path, "--output", tmp_path / "ray", *(f"--set={change}" for change in changes))
    run(loaded, tmp_path / "local")
    for stage in ("sft", "dpo"):
        assert losses(tmp_path / "ray", stage) == pytest.approx(losses(tmp_path / "local", stage), rel=1e-5)
    assert check_run(tmp_path / "ray").problems == []
