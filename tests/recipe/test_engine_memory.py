"""What a rollout engine is given by default, by hand."""

import psutil
import pytest

from rlhf.recipe.engine_memory import BLOCK, cpu_cache, engine_memory
from rlhf.recipe.model_shape import ModelShape
from rlhf.recipe.role_schema import RolloutRole

GIB = 2**30
SHAPE = ModelShape(
    parameters=1000,
    lm_head=0,
    hidden=64,
    intermediate=128,
    layers=16,
    heads=8,
    q_width=1024,
    kv_width=512,
    vocabulary=100,
    linears={},
    biases=0,
    layer_sizes=(),
    last_norm=0,
)


@pytest.mark.parametrize(("keys", "sequences"), [({}, 64), ({"gpus": 1}, 256), ({"share": "policy"}, 256)])
def test_more_sequences_at_once_on_a_gpu(keys, sequences):
    assert RolloutRole(**keys).max_sequences == sequences
    assert RolloutRole(**keys, max_sequences=7).max_sequences == 7


TOKEN = 16 * 2 * 512 * 2


def test_cache_on_the_cpu_holds_all_sequences_in_whole_blocks():
    found = engine_memory(SHAPE, "bfloat16", RolloutRole(), 1000, None)
    assert found.needed == 64 * 1000 * TOKEN
    assert found.room == (64 * 8 + 1) * BLOCK * TOKEN  # 8 blocks hold 1,000 tokens
    assert engine_memory(SHAPE, "bfloat16", RolloutRole(kv_cache_gib=5), 1000, None).room == 5 * GIB
    assert engine_memory(SHAPE, "bfloat16", RolloutRole(kv_cache_gib=0.25), 1000, None).room == GIB // 4


def test_cache_is_as_large_as_the_data_s_longest_sequence_needs():
    short = engine_memory(SHAPE, "bfloat16", RolloutRole(), 1000, None, usual=100).room
    assert short == (64 + 1) * BLOCK * TOKEN
    assert engine_memory(SHAPE, "bfloat16", RolloutRole(max_sequences=1), 1000, None, 100).room == 9 * BLOCK * TOKEN
    assert engine_memory(SHAPE, "bfloat16", RolloutRole(), 1000, None, 5000).room == (64 * 8 + 1) * BLOCK * TOKEN


def test_cache_takes_at_most_an_eighth_of_memory_and_always_one_sequence():
    eighth = psutil.virtual_memory().total // 8
    block = BLOCK * TOKEN
    assert cpu_cache(10**6, 1000, 1000, TOKEN) == eighth // block * block + block
    assert cpu_cache(1, 10, 10**6, eighth) == (-(-(10**6) // BLOCK) + 1) * BLOCK * eighth
