"""What a rollout engine is given by default, by hand."""

import psutil
import pytest

from rlhf.recipe.engine_memory import cache_gib, engine_memory
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


def test_cache_on_the_cpu_holds_all_sequences_at_full_length():
    token = 16 * 2 * 512 * 2
    needed = engine_memory(SHAPE, "bfloat16", RolloutRole(), 1000, None).needed
    assert needed == 64 * 1000 * token
    assert engine_memory(SHAPE, "bfloat16", RolloutRole(), 1000, None).room == 2 * GIB
    assert engine_memory(SHAPE, "bfloat16", RolloutRole(kv_cache_gib=5), 1000, None).room == 5 * GIB


def test_cache_takes_at_most_an_eighth_of_memory_and_never_nothing():
    assert cache_gib(10) == 1
    assert cache_gib(10**15) == max(1, psutil.virtual_memory().total // 8 // GIB)
