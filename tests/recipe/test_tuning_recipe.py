"""Which tuning methods a recipe may ask for where, and what the plan says of them."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from transformers import LlamaConfig, Qwen2Config

from rlhf.errors import RecipeError
from rlhf.installing import extra_command
from rlhf.recipe.activations import Pass
from rlhf.recipe.check_tuning import check_model, misfit
from rlhf.recipe.memory import Cut, learner_memory
from rlhf.recipe.model_shape import Model, read_shape
from rlhf.recipe.plan import make_plan
from rlhf.recipe.plan_table import render_plan
from rlhf.recipe.resources import Resources, reference_in_policy, wanted
from rlhf.recipe.tuning_schema import Full, Layers, LlamaAdapter, Lora, PromptTuning, Qlora
from rlhf.recipe.tuning_support import SUPPORT, methods, support

ABLE = "full, lora, qlora, ia3, bitfit, layers"
MACHINE = Resources(cpus=4, gpus=0, memory_bytes=16 << 30)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            ("stages.sft.tuning={kind: prefix_tuning}",),
            "stages.sft.tuning.kind: prefix_tuning leaves an adapter and no model, and stage 'pairs' uses the model; "
            f"methods that leave one: {ABLE}",
        ),
        (
            ("stages.ppo.tuning={kind: llama_adapter}",),
            "stages.ppo.tuning.kind: llama_adapter leaves no weights that the rollout engine could serve; "
            f"those that do: {ABLE}",
        ),
        (
            ("stages.rm.tuning={kind: p_tuning}",),
            "stages.rm.tuning.kind: p_tuning leaves an adapter and no model, and stage 'ppo' uses the model; "
            f"methods that leave one: {ABLE}",
        ),
        (
            ("roles.rollout.weights=adapter", "stages.ppo.tuning={kind: lora, dora: true}"),
            "roles.rollout.weights: stage 'ppo' trains by lora with dora or pissa, which vLLM does not serve beside "
            "the base (plain lora it does); use weights: merged",
        ),
        (
            ("roles.rollout.weights=adapter", "stages.ppo.tuning={kind: qlora}"),
            "roles.rollout.weights: stage 'ppo' trains by qlora, which vLLM does not serve beside the base (plain lora "
            "it does); use weights: merged",
        ),
        (
            ("stages.rm.tuning={kind: qlora}", "roles.reward={ranks: 2, zero_stage: 3}"),
            "stages.rm.tuning.kind: qlora cannot be cut over ranks (roles.reward.zero_stage: 3); use 1 or 2, or lora",
        ),
        (
            ("stages.ppo.critic_tuning={kind: prefix_tuning}", "roles.critic.gradient_checkpointing=true"),
            "stages.ppo.critic_tuning.kind: prefix_tuning has no gradient checkpointing "
            "(roles.critic.gradient_checkpointing): its keys and values stand in a cache, which a layer that is "
            "computed again would fill twice",
        ),
        (
            ("stages.sft.tuning={kind: layers}",),
            'stages.sft.tuning: must be a choice of layers: last: 2, or indices: [0, 1], got {"kind": "layers"}',
        ),
        (
            ("stages.sft.tuning={kind: layers, last: 1, indices: [0]}",),
            "stages.sft.tuning: must be a choice of layers: last: 2, or indices: [0, 1], "
            'got {"kind": "layers", "last": 1, "indices": [0]}',
        ),
    ],
)
def test_what_cannot_be_is_said_with_what_can(folder, text, changes, expected):
    with pytest.raises(RecipeError) as caught:
        folder.load(text, *changes)
    assert expected in [line.removeprefix("--set ") for line in str(caught.value).splitlines()]


def test_an_inherited_method_is_told_with_its_stage(folder, text):
    with pytest.raises(RecipeError) as caught:
        folder.load(text + "tuning: {kind: prompt_tuning}\n")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"recipe.yaml:{text.count(chr(10)) + 1}:16: tuning.kind: stage ")
    assert {line.split("stage ")[1].split(":")[0] for line in lines} == {"sft", "rm", "ppo", "dpo"}


def test_quantisation_needs_its_package(folder, text, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError) as caught:
        folder.load(text, "stages.sft.tuning={kind: qlora}")
    wanted_text = f"qlora needs bitsandbytes, which is not installed: {extra_command('qlora')}, or use lora"
    assert str(caught.value) == f"--set stages.sft.tuning.kind: {wanted_text}"
    folder.load(text, "stages.sft.tuning={kind: qlora}", "ray.address=auto")  # it may be there


@pytest.mark.parametrize(
    "changes",
    [
        ("tuning={kind: ia3}",),
        ("tuning={kind: bitfit}",),
        ("tuning={kind: layers, last: 1}",),
        ("stages.dpo.tuning={kind: ia3}",),
        ("stages.ppo.critic_tuning={kind: prompt_tuning}",),
        ("roles.rollout.weights=adapter", "stages.ppo.tuning={kind: lora, rslora: true}"),
    ],
)
def test_what_can_be(folder, text, changes):
    folder.load(text, *changes)


def test_a_stage_that_nothing_uses_may_leave_an_adapter_alone(folder, text):
    alone = "  - {name: prompted, kind: sft, data: {path: data/sft.jsonl}, tuning: {kind: p_tuning}}\n"
    folder.load(text + alone)


def test_a_reward_model_that_nothing_could_score_with_is_refused(folder, text):
    alone = "  - {name: rm2, kind: reward, data: {path: data/pairs.jsonl}, tuning: {kind: p_tuning}}\n"
    with pytest.raises(RecipeError, match=f"no reward model that anything could score with; those that do: {ABLE}"):
        folder.load(text + alone)


def test_the_reference_stays_in_the_policy_while_its_base_is_whole(folder, text):
    def shared(tuning):
        recipe = folder.load(text, "roles.reference={share: policy}", f"stages.ppo.tuning={tuning}").recipe
        stage = next(stage for stage in recipe.stages if stage.name == "ppo")
        assert ("reference" in wanted(recipe, stage)) != reference_in_policy(recipe, stage)
        return reference_in_policy(recipe, stage)

    inside = ("{kind: lora}", "{kind: lora, dora: true}", "{kind: ia3}", "{kind: qlora}")
    outside = ("{kind: full}", "{kind: lora, init: pissa}", "{kind: bitfit}", "{kind: layers, last: 1}")
    assert [shared(tuning) for tuning in (*inside, *outside)] == [True] * 4 + [False] * 4


def test_support_is_one_table():
    assert methods(lambda method: method.merges) == ABLE
    assert {kind for kind in SUPPORT if not support_of(kind).flat} == {"prefix_tuning", "prompt_tuning", "p_tuning"}
    assert support(Lora(rslora=True)).served
    assert not support(Lora(dora=True)).served
    assert not support(Lora(init="pissa")).reference


def support_of(kind):
    return SUPPORT[kind]


@pytest.mark.parametrize(
    ("tuning", "message"),
    [
        (
            "{kind: bitfit}",
            "bitfit: the model has no bias terms (Llama and Mistral have none, Qwen2 has some); use lora",
        ),
        ("{kind: layers, last: 4}", "layers: the model has 3 layers"),
        ("{kind: lora, target_modules: [x]}", "lora: target_modules: the model has no linear layers named ['x']"),
        ("{kind: lora, r: 65, init: pissa}", "lora: init: pissa takes 65 directions, more than a target layer is wide"),
    ],
)
def test_the_model_is_looked_at_before_anything_runs(folder, text, tmp_path, tuning, message):
    llama().save_pretrained(tmp_path / "model")
    shape = read_shape(tmp_path / "model")
    recipe = folder.load(text, f"stages.dpo.tuning={tuning}").recipe
    with pytest.raises(RecipeError) as caught:
        check_model(recipe, shape)
    assert str(caught.value).startswith(f"stages.dpo.tuning: {message}")
    assert misfit(LlamaAdapter(layers=4), shape) == "the model has 3 layers"


def test_other_architectures(folder, text, tmp_path):
    Qwen2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=90).save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    check_model(folder.load(text, "tuning={kind: bitfit}").recipe, shape)
    recipe = folder.load(text, "stages.dpo.tuning={kind: ia3}").recipe
    check_model(recipe, shape)
    with pytest.raises(RecipeError, match="ia3: the model has no linear layers named k_proj, v_proj and down_proj or"):
        check_model(recipe, replace(shape, linears={"h.0.c_attn": (8, 24)}))
    alone = "  - {name: gated, kind: sft, data: {path: data/sft.jsonl}, tuning: {kind: llama_adapter}}\n"
    with pytest.raises(RecipeError, match=r"stages.gated.tuning: llama_adapter: it is for llama and mistral models"):
        check_model(folder.load(text + alone).recipe, shape)


def llama():
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )


def test_memory_of_methods(tmp_path):
    """What is not trained has no gradients and no optimizer; a 4-bit base weighs about half a byte a weight."""
    llama().save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    work = Pass(tokens=64, width=16, scored=64)

    def memory(tuning):
        return learner_memory(Model(shape, "bfloat16", False, tuning), work, Cut(), on_gpu=True).learn

    full, lora, qlora = memory(Full()), memory(Lora(r=4)), memory(Qlora(r=4))
    assert full.optimizer == 12 * shape.parameters
    assert lora.optimizer == qlora.optimizer == 12 * 4 * sum(a + b for a, b in shape.linears.values())
    linear = sum(a * b for a, b in shape.linears.values())
    assert lora.weights - qlora.weights == pytest.approx(linear * (2 - 0.5159), rel=1e-4)
    assert qlora.buffers == 2 * 64 * 160  # the largest layer, as it is multiplied with
    last = memory(Layers(last=1, norm=False))
    assert last.optimizer == 12 * shape.layer_sizes[2]
    assert last.activations < full.activations / 2
    assert (
        memory(PromptTuning(virtual_tokens=16)).activations > 1.5 * memory(PromptTuning(virtual_tokens=1)).activations
    )


def test_the_plan_names_each_method(folder, text):
    loaded = folder.load(text, "tuning={kind: ia3}", "stages.dpo.tuning={kind: lora, rslora: true, dora: true, r: 2}")
    plan = make_plan(loaded, MACHINE)
    roles = {(stage.name, role.role): role for stage in plan.stages for role in stage.roles}
    assert roles["sft", "policy"].tuning == "ia3"
    assert roles["ppo", "rollout"].tuning == ""
    assert roles["dpo", "policy"].tuning == "lora+rslora+dora"
    # the tiny Llama: 2 layers of keys 32, values 32 and the inner width 128
    assert roles["sft", "policy"].trainable == 2 * (32 + 32 + 128)
    assert roles["rm", "reward"].trainable == 2 * (32 + 32 + 128) + 64
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(render_plan(plan))
    shown = console.export_text()
    assert "policy, lora+rslora+dora" in shown
    assert "critic, ia3" in shown
