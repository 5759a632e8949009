"""Schedules by hand, and the plan as a person and a program read it."""

import io
import json
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from rlhf.errors import RecipeError
from rlhf.recipe.plan import check_lengths, headline, look_up, make_plan
from rlhf.recipe.plan_table import render_plan
from rlhf.recipe.resources import Resources
from rlhf.recipe.schedule import longest, microbatch_tokens, row_count, schedule

MACHINE = Resources(cpus=4, gpus=0, memory_bytes=64 << 30)


def schedules(loaded):
    return {stage.name: dict(schedule(loaded.recipe, stage)) for stage in loaded.recipe.stages}


def test_schedules_by_hand(folder, text):
    text = text.replace("data/sft.jsonl}", "data/sft.jsonl}\n    batch_size: 2\n    epochs: 3")
    text = text.replace(
        "data: {stage: pairs}\n  - name: duel", "data: {stage: pairs}\n    batch_size: 4\n  - name: duel"
    )
    assert schedules(folder.load(text)) == {
        "sft": {"rows": 3, "optimizer_steps": 3 * 2, "batch_size": 2, "max_tokens": 1024},
        "pairs": {"prompts": 10, "rollouts": 40, "max_tokens": 768},
        "rm": {"pairs_at_most": 10, "optimizer_steps_at_most": 1, "batch_size": 16, "max_tokens": 1024},
        "ppo": {
            "prompts": 10,
            "steps": 3,
            "sequences_per_step": 16,
            "minibatches_per_epoch": 3,
            "optimizer_steps_per_step": 6,
            "optimizer_steps": 18,
            "rollouts": 48,
            "max_tokens": 768,
        },
        "dpo": {"pairs_at_most": 10, "optimizer_steps_at_most": 3, "batch_size": 4, "max_tokens": 1024},
        "duel": {"prompts": 4, "rollouts": 12, "max_tokens": 768},
    }


def test_all_pairs_of_a_file_and_of_a_stage(folder, text):
    text = text.replace("    judge:", "    pairing: all\n    judge:")
    dpo = "data: {stage: pairs}\n  - name: duel"
    text = text.replace(
        dpo, "data: {path: data/prompts.jsonl}\n    heldout_fraction: 0.2\n    batch_size: 4\n  - name: duel"
    )
    found = schedules(folder.load(text))
    assert found["rm"]["pairs_at_most"] == 10 * 6
    assert (found["dpo"]["rows"], found["dpo"]["optimizer_steps"]) == (10, 2)


def test_kto_counts_both_sides_of_pairs_and_single_responses_once(folder, text):
    kto = text.replace("kind: dpo", "kind: kto\n    batch_size: 4\n    max_length: 3000")
    assert schedules(folder.load(kto))["dpo"]["optimizer_steps_at_most"] == 5
    data = "data: {stage: pairs}\n  - name: duel"
    for format, steps in (("preference", 5), ("kto", 3)):
        named = kto.replace(data, f"data: {{path: data/prompts.jsonl, format: {format}}}\n  - name: duel")
        found = schedules(folder.load(named))["dpo"]
        assert (found["rows"], found["optimizer_steps"]) == (10, steps)
    loaded = folder.load(kto.replace(data, "data: {path: data/prompts.jsonl}\n  - name: duel"))
    assert "optimizer_steps" not in schedules(loaded)["dpo"]
    assert microbatch_tokens(loaded.recipe, loaded.recipe.stages[4]) == 3000


def test_what_cannot_be_counted_is_left_out(folder, text):
    folder.write("data/sft.csv", "a\n1\n")
    text = text.replace("data/sft.jsonl", "data/sft.csv").replace("path: data/prompts.jsonl", "hub: org/prompts")
    found = schedules(folder.load(text))
    assert found["sft"] == {"batch_size": 16, "max_tokens": 1024}
    assert found["pairs"] == {"max_tokens": 768}
    assert found["rm"] == {"batch_size": 16, "max_tokens": 1024}
    assert "prompts" not in found["ppo"]


def test_row_count_skips_blank_lines_and_stops_at_the_limit(folder, text):
    stage = folder.load(text).recipe.stages[0]
    assert row_count(stage.data) == 3
    assert row_count(stage.data.model_copy(update={"limit": 2})) == 2


def test_token_counts(folder, text):
    recipe = folder.load(text, "stages.duel.max_response_tokens=1000").recipe
    assert longest(recipe) == 512 + 1000
    tokens = {stage.name: microbatch_tokens(recipe, stage) for stage in recipe.stages}
    assert tokens == {"sft": 1024, "pairs": 1024, "rm": 2048, "ppo": 1024, "dpo": 2048, "duel": 1512}
    gpus = folder.load(text, "roles.policy.gpus=1", "roles.reward.gpus=1").recipe
    assert {microbatch_tokens(gpus, stage) for stage in gpus.stages if stage.name in ("sft", "rm", "dpo")} == {4096}
    own = folder.load(text, "stages.sft.max_tokens_per_microbatch=2500").recipe
    assert microbatch_tokens(own, own.stages[0]) == 2500
    small = folder.load(text, "stages.sft.batch_size=2", "stages.dpo.max_length=3000").recipe
    assert microbatch_tokens(small, small.stages[0]) == 1024
    assert microbatch_tokens(small, small.stages[4]) == 2 * 3000


def test_headline(folder, text):
    plan = make_plan(
        folder.load(text, "roles.reference.share=policy", "roles.critic.gpus=0.5", "roles.rollout.replicas=2"), MACHINE
    )
    assert headline(replace(plan, seconds=None)) == (
        "trial: sft -> pairs (annotate) -> rm (reward) -> ppo -> dpo -> duel (compare); on Ray: "
        "policy CPU, reward CPU, critic 0.5 GPU, rollout 2 x CPU (vllm), reference in policy"
    )
    assert "; in this process: policy CPU" in headline(replace(plan, backend="local"))
    assert headline(replace(plan, seconds=610.0, disturbed=False)).endswith("; roughly 10 min")
    assert headline(replace(plan, seconds=21780.0, disturbed=False)).endswith("; roughly 6.0 h")
    busy = headline(replace(plan, seconds=610.0, disturbed=True))
    assert busy.endswith("roughly 10 min at the speed that other programs leave")


def test_plan_of_the_tiny_model(folder, text):
    plan = make_plan(folder.load(text), MACHINE)
    roles = {(stage.name, role.role): role for stage in plan.stages for role in stage.roles}
    assert 80_000 < plan.parameters < 100_000
    assert plan.warnings == ()
    assert {key for key, role in roles.items() if role.trainable} == {
        ("sft", "policy"),
        ("rm", "reward"),
        ("ppo", "policy"),
        ("ppo", "critic"),
        ("dpo", "policy"),
    }
    assert roles["ppo", "policy"].trainable + 64 == roles["ppo", "critic"].trainable
    assert roles["ppo", "policy"].threads == 2
    assert plan.usual_length < 100 + 256  # the prompts are short
    token = 2 * 2 * 32 * 4  # keys and values of 2 layers, 32 wide, in float32
    blocks = 64 * -(-plan.usual_length // 128) + 1
    assert roles["ppo", "rollout"].memory.kv_cache == blocks * 128 * token
    ppo = plan.stages[3]
    assert {role.role for role in ppo.roles} <= set(ppo.memory.parts)
    assert json.loads(json.dumps(asdict(plan)))["stages"][3]["schedule"]["rollouts"] == 48


def test_full_training_of_one_role_only(folder, text):
    plan = make_plan(folder.load(text, "stages.ppo.critic_tuning={kind: full}"), MACHINE)
    roles = {role.role: role for role in plan.stages[3].roles}
    assert roles["critic"].trainable == roles["critic"].parameters
    assert roles["policy"].trainable < roles["policy"].parameters / 2


def test_warnings(folder, text):
    loaded = folder.load(text, "stages.ppo.prompts_per_step=11")
    plan = make_plan(loaded, MACHINE)
    assert plan.warnings == ("stage ppo has 10 prompts but takes 11 a step",)


def test_rendered_plan_fits_a_terminal(folder, text):
    plan = make_plan(folder.load(text), MACHINE)
    out = io.StringIO()
    Console(file=out, width=100).print(render_plan(plan))
    shown = out.getvalue()
    assert "\u2026" not in shown
    assert "available: 4 CPUs, 0 GPUs, 64.00 GiB" in shown
    rows = [line.split() for line in shown.splitlines()]
    engine = ["rollout", "1", "0", "4", "0", "generate", "0.00", "0.00", "0.00", "0.00", "0.00", "0.01", "0.00", "0.01"]
    assert engine in rows
    assert "optimizer steps per step 6" in " ".join(shown.split())


def test_more_tokens_than_the_model_has_positions_are_refused(folder, text):
    recipe = folder.load(text, "stages.duel.max_response_tokens=1000").recipe
    shape = look_up(recipe).shapes.base
    check_lengths(recipe, replace(shape, positions=1512))
    check_lengths(recipe, replace(shape, positions=None))
    with pytest.raises(RecipeError, match=r"stages.duel: .* = 1512, but tiny://llama has 1511 positions"):
        check_lengths(recipe, replace(shape, positions=1511))


def test_pairs_that_may_be_longer_than_their_stage_allows_are_a_warning(folder, text):
    """The pairs are sampled with 512 tokens for the prompt and 256 for the response at most."""
    assert make_plan(folder.load(text, "stages.dpo.max_length=768"), MACHINE).warnings == ()
    (warning,) = make_plan(folder.load(text, "stages.dpo.max_length=767"), MACHINE).warnings
    assert warning == "stage dpo stops at rows over max_length 767; what it reads may have 768 tokens"
