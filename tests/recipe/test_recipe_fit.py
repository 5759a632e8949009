"""Plans for GPUs that are not there: what stands on one, what does not fit, what helps, and how few suffice."""

import io
import json
from dataclasses import asdict

import pytest
from click.testing import CliRunner
from rich.console import Console
from ruamel.yaml import YAML
from transformers import LlamaConfig

from rlhf.cli import main
from rlhf.errors import RecipeError
from rlhf.recipe.check_roles import check_roles
from rlhf.recipe.devices import DEVICES, named_device
from rlhf.recipe.fit import Shapes, check_memory, remedies, with_role
from rlhf.recipe.model_shape import read_shape
from rlhf.recipe.phases import stage_memory
from rlhf.recipe.placement import place
from rlhf.recipe.plan import make_plan
from rlhf.recipe.plan_table import render_plan
from rlhf.recipe.resources import Resources
from rlhf.recipe.role_schema import Roles
from rlhf.recipe.smallest import smallest
from tests.placeholder_weights import placeholder_weights

MACHINE = Resources(cpus=4, gpus=0, memory_bytes=64 << 30)
H100, L4 = DEVICES["h100-80gb"], DEVICES["l4-24gb"]
GIB = 2**30
GPUS = """\
name: large
model: {path: model, dtype: bfloat16}
tuning: {kind: full}
roles:
  policy: {gpus: 1, ranks: 4}
  reference: {gpus: 1}
  critic: {gpus: 1, ranks: 4}
  rollout: {gpus: 1}
stages:
  - name: ppo
    kind: ppo
    policy: base
    reward: {kind: function, path: "rewards.py:score"}
    prompts: {path: data/prompts.jsonl}
    steps: 3
    prompts_per_step: 8
    samples_per_prompt: 2
    minibatch_size: 16
"""
EIGHT_B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def large(folder):
    """Write the config of an 8B Llama, whose weights nothing reads."""
    LlamaConfig(**EIGHT_B).save_pretrained(folder.path / "model")
    placeholder_weights(folder.path / "model" / "model.safetensors", 16 * 10**9)
    return folder


@pytest.fixture
def shapes(large):
    return Shapes(read_shape(large.path / "model"), {})


def test_four_ranks_of_an_8b_policy_fit_an_h100_and_two_do_not(large, shapes):
    recipe = large.load(GPUS).recipe
    fit = check_memory(recipe, shapes, H100)
    assert (fit.problems, fit.crowded) == ((), ())
    two = with_role(recipe, "policy", ranks=2)
    found = check_memory(two, shapes, H100)
    assert found.crowded == ("policy",)
    assert found.problems[0].startswith("stage ppo needs ")
    assert "on one GPU to learn (policy " in found.problems[0]


def test_remedies_that_suffice(large, shapes):
    recipe = with_role(large.load(GPUS).recipe, "policy", ranks=2)
    found = remedies(recipe, shapes, H100)
    assert found[0] == "roles.policy.offload: optimizer"
    assert check_memory(recipe, shapes, H100).problems
    assert not check_memory(with_role(recipe, "policy", offload="optimizer"), shapes, H100).problems
    assert "roles.policy.ranks: 4" in found


def test_changes_that_only_together_suffice(large, shapes):
    recipe = with_role(with_role(large.load(GPUS).recipe, "policy", ranks=1), "critic", ranks=1)
    (found,) = remedies(recipe, shapes, H100)
    steps = found.split(" and ")
    assert len(steps) > 1
    assert {"policy", "critic"} <= {step.split(".")[1] for step in steps}


def test_turns_on_shared_gpus(large, shapes):
    shared = "rollout: {share: policy, replicas: 4, gpu_memory_utilization: 0.5}"
    recipe = large.load(GPUS.replace("rollout: {gpus: 1}", shared)).recipe
    roles = stage_memory(recipe, recipe.stages[0], shapes.base, None, H100)
    policy, rollout = roles["policy"].phases, roles["rollout"].phases
    assert policy["generate"].total < GIB < policy["publish"].weights
    assert rollout["learn"].total < GIB < rollout["publish"].weights
    assert (rollout["publish"].kv_cache, rollout["generate"].kv_cache > GIB) == (0, True)
    assert rollout["generate"].total == pytest.approx(0.5 * H100.memory)
    apart = large.load(GPUS).recipe
    roles = stage_memory(apart, apart.stages[0], shapes.base, None, H100)
    assert roles["rollout"].phases["learn"].kv_cache > GIB
    assert roles["policy"].phases["generate"].optimizer > GIB


def test_what_shares_a_gpu_adds_up(large, shapes):
    recipe = large.load(GPUS.replace("critic: {gpus: 1, ranks: 4}", "critic: {share: policy, ranks: 4}")).recipe
    fit = check_memory(recipe, shapes, H100)
    assert set(fit.peak.parts) == {"policy", "critic"}
    assert fit.peak.total == sum(fit.peak.parts.values()) > H100.memory
    assert fit.crowded == ("policy",)


def test_a_fraction_of_a_gpu_has_its_fraction_of_the_memory(large, shapes):
    recipe = large.load(GPUS.replace("reference: {gpus: 1}", "reference: {gpus: 0.2}")).recipe
    assert check_memory(recipe, shapes, H100).crowded == ("reference",)


def test_the_smallest_layout_fits_and_one_with_fewer_ranks_does_not(large, shapes):
    recipe = large.load(GPUS).recipe
    found = smallest(recipe, shapes, H100)
    roles = Roles.model_validate(YAML(typ="safe").load(found.block())["roles"])
    best = recipe.model_copy(update={"roles": roles})
    assert check_memory(best, shapes, H100).problems == ()
    assert not list(check_roles(best))
    assert sum(bundle.resources.get("GPU", 0) for bundle in place(best)) == found.gpus <= 10
    assert smallest(recipe, shapes, DEVICES["b200-180gb"]).gpus < found.gpus


def test_a_small_model_needs_one_gpu(folder, text):
    loaded = folder.load(text)
    plan = make_plan(loaded, MACHINE, L4, search=True)
    assert plan.smallest.gpus == 1
    assert plan.fit.peak is None
    assert "smallest: 1 x l4-24gb (policy ranks 1), with" in shown(plan)


def shown(plan):
    out = io.StringIO()
    Console(file=out, width=100).print(render_plan(plan))
    return out.getvalue()


def test_the_plan_says_it_all(large):
    plan = make_plan(large.load(GPUS), MACHINE, H100, search=True)
    text = shown(plan)
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert "fullest GPU: " in text
    stage = json.loads(json.dumps(asdict(plan)))["stages"][0]
    assert stage["step"] == {"ranks": 4, "rows_per_rank": 4, "passes_per_rank": 1, "tokens_per_pass": 4 * 768}
    online = stage["online"]
    assert (online["generated_tokens"], online["optimizer_steps"]) == (16 * 256, 2)
    assert online["trained_tokens"] == 2 * 2 * 16 * 768
    seconds = online["seconds"]
    parts = sum(seconds[name] for name in ("generate", "score", "learn", "publish"))
    assert seconds["step"] == pytest.approx(parts)
    assert 0.1 < seconds["step"] < 60


def test_staleness_hides_generation(large):
    late = make_plan(large.load(GPUS, "stages.ppo.staleness=1"), MACHINE, H100).stages[0].online.seconds
    work = late["score"] + late["learn"]
    assert late["step"] == pytest.approx(max(late["generate"], work) + late["publish"])


def test_the_command_ends_with_4_and_a_remedy(large):
    large.load(GPUS)
    arguments = ["plan", "recipe.yaml", "--gpu", "l4-24gb"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 4
    assert result.stderr.startswith("error: stage ppo needs ")
    assert "would help: " in result.stdout
    assert CliRunner().invoke(main, ["plan", "recipe.yaml", "--gpu", "h100-80gb"]).exit_code == 0


def test_unknown_devices_are_refused_with_the_known_ones(large):
    large.load(GPUS)
    result = CliRunner().invoke(main, ["plan", "recipe.yaml", "--gpu", "h100"])
    assert result.exit_code == 2
    assert "h100-80gb" in result.stderr
    with pytest.raises(RecipeError, match="unknown device"):
        named_device("")


def test_a_critic_that_is_fitted_needs_the_moments_of_its_states(large, shapes):
    """Five folds of H x H doubles and as many again; 8 billion parameters have H = 4,096, so that is 1.25 GiB."""
    scored = {}
    for start in ("fitted", "loaded"):
        recipe = large.load(GPUS).recipe
        stages = [stage.model_copy(update={"critic_start": start}) for stage in recipe.stages if stage.kind == "ppo"]
        memory = stage_memory(recipe, stages[0], shapes.base, None, H100)
        scored[start] = memory["critic"].phases["score"].total
    assert scored["fitted"] - scored["loaded"] == 10 * 8 * 4096**2
