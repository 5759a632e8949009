"""Limits lowered to what the data has, and a recipe that does not fit into main memory, by hand."""

import pytest

from rlhf.errors import ResourceError
from rlhf.recipe.fit import Shapes
from rlhf.recipe.host_fit import check_caches, check_main_memory, run_memory
from rlhf.recipe.model_shape import ModelShape
from rlhf.recipe.process_memory import CONTROLLER, ENGINE, FUNCTION, LEARNER, RAY, WEIGHTS_SENT
from rlhf.recipe.row_lengths import RowLengths, narrowed
from rlhf.recipe.schedule import longest

GIB = 2**30
SHAPE = ModelShape(
    parameters=134_500_000,
    lm_head=28_000_000,
    hidden=576,
    intermediate=1536,
    layers=30,
    heads=9,
    q_width=576,
    kv_width=192,
    vocabulary=49152,
    linears={"q_proj": (576, 576)},
    biases=0,
    layer_sizes=(3_000_000,) * 30,
    last_norm=576,
)
SHAPES = Shapes(SHAPE, {})
MEASURED = {
    "stages.sft.data": RowLengths(40, 44, complete=True),
    "stages.pairs.prompts": RowLengths(20, 25, complete=True),
    "stages.ppo.prompts": RowLengths(20, 30, complete=False),
    "stages.duel.prompts": RowLengths(20, 9999, complete=True),
}


def limits(recipe):
    return {stage.name: getattr(stage, "max_length", None) or stage.max_prompt_tokens for stage in recipe.stages}


def test_limits_become_as_long_as_the_data(folder, text):
    recipe = folder.load(text).recipe
    before = limits(recipe)
    found = limits(narrowed(recipe, MEASURED))
    responses = {stage.name: getattr(stage, "max_response_tokens", 0) for stage in recipe.stages}
    assert found["sft"] == 44
    assert found["pairs"] == 25
    assert found["rm"] == found["dpo"] == 25 + responses["pairs"]
    assert found["ppo"] == before["ppo"]  # not all rows were measured
    assert found["duel"] == before["duel"]  # a limit is never raised
    unmeasured = limits(narrowed(recipe, {}))
    assert unmeasured == before | dict.fromkeys(("rm", "dpo"), before["pairs"] + responses["pairs"])


def test_a_measured_prompt_file_makes_the_cache_small(folder, text):
    recipe = folder.load(text, "model.dtype=float32", "roles.rollout.engine=vllm").recipe
    every = {key: RowLengths(20, 25, complete=True) for key in MEASURED}
    assert longest(narrowed(recipe, every)) < longest(recipe)
    measured, limit = (
        next(memory for memory in run_memory(recipe, SHAPES, known) if memory.stage == "pairs").parts["rollout"]
        for known in (every, {})
    )
    assert measured < limit


def test_every_process_counts_with_its_libraries(folder, text):
    recipe = folder.load(text, "roles.rollout.engine=vllm").recipe
    ppo = next(memory for memory in run_memory(recipe, SHAPES, {}) if memory.stage == "ppo")
    assert ppo.parts["command"] == CONTROLLER
    assert ppo.parts["ray"] == RAY
    assert ppo.parts["policy"] > LEARNER
    assert ppo.parts["rollout"] > ENGINE + WEIGHTS_SENT
    assert ppo.total == sum(ppo.parts.values())
    weights = 134_500_000 * 4 - 28_000_000 * 4
    own = folder.load(text, "roles.rollout.engine=vllm", "stages.ppo.critic_tuning={kind: full}").recipe
    full = next(memory for memory in run_memory(own, SHAPES, {}) if memory.stage == "ppo")
    assert full.parts["critic"] > ppo.parts["critic"] + weights  # adapters share the reward model's file


def test_an_engine_stays_while_later_stages_train(folder, text):
    recipe = folder.load(text, "roles.rollout.engine=vllm").recipe
    memory = {memory.stage: memory.parts for memory in run_memory(recipe, SHAPES, {})}
    assert "rollout" not in memory["sft"]
    assert memory["rm"]["rollout"] > ENGINE
    assert memory["dpo"]["critic"] == LEARNER


def test_in_one_process_there_are_no_others(folder, text):
    recipe = folder.load(text, "backend=local").recipe
    first = run_memory(recipe, SHAPES, {})[0]
    assert set(first.parts) <= {"command", "policy", "reward functions"}
    assert first.parts.get("reward functions", 0) % FUNCTION == 0


def test_too_little_memory_is_refused_with_what_would_help(folder, text):
    recipe = folder.load(text).recipe
    need = max(memory.total for memory in run_memory(recipe, SHAPES, MEASURED))
    check_main_memory(recipe, SHAPES, MEASURED, need)
    with pytest.raises(ResourceError, match=r"would help: .*max_tokens_per_microbatch|would help: .*gradient_checkp"):
        check_main_memory(recipe, SHAPES, MEASURED, need - 2**20)
    with pytest.raises(ResourceError, match="smaller model or a machine with more memory"):
        check_main_memory(recipe, SHAPES, MEASURED, GIB)
    check_main_memory(recipe, SHAPES, MEASURED, GIB, todo=())


def test_a_cache_without_room_for_one_sequence_is_refused_by_its_key(folder, text):
    """A token takes 30 layers x 2 x 192 x 4 bytes; the longest sequence has 512 + 256, and a block of 128 is unused."""
    check_caches(folder.load(text).recipe, SHAPES, MEASURED)
    least = (768 + 128) * 30 * 2 * 192 * 4 / GIB
    small, enough = (
        folder.load(text, f"roles.rollout.kv_cache_gib={size}").recipe for size in (0.9 * least, 1.1 * least)
    )
    with pytest.raises(ResourceError, match=r"roles.rollout.kv_cache_gib: one sequence of full length takes 0.0\d+ in"):
        check_caches(small, SHAPES, MEASURED)
    check_caches(enough, SHAPES, MEASURED)


def test_a_cache_that_is_too_large_is_what_would_help(folder, text):
    recipe = folder.load(text, "roles.rollout.kv_cache_gib=30").recipe
    with pytest.raises(ResourceError, match=r"would help: no roles\.rollout\.kv_cache_gib"):
        check_main_memory(recipe, SHAPES, MEASURED, 20 * GIB)
