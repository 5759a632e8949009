"""Counted operations against counts by hand and by torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rlhf.bench.batches import collated
from rlhf.bench.work import Cost, Decoder, Work
from rlhf.models.loading import load_causal
from rlhf.models.scalar import load_scalar
from rlhf.models.tuning import apply_tuning
from rlhf.recipe.model_shape import read_shape
from rlhf.recipe.tuning_schema import Lora

LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128
"""Queries, keys and values (one head for two), output, and three maps of the MLP."""


def test_cost_of_the_tiny_model(tiny_folder):
    cost = Cost.of(load_causal(tiny_folder, "float32"))
    assert cost == Cost(2 * LAYER, 0, 64 * 262, 2 * 64, trains_body=True, trains_head=True)


def test_lora_freezes_body_and_head(tiny_folder):
    cost = Cost.of(apply_tuning(load_causal(tiny_folder, "float32"), Lora(r=4), seed=0))
    widths = [64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 128, 64 + 128, 128 + 64]
    assert cost == Cost(2 * LAYER, 2 * 4 * sum(widths), 64 * 262, 2 * 64, trains_body=False, trains_head=False)


def test_scalar_head_is_read_once_a_position(tiny_folder):
    cost = Cost.of(load_scalar(tiny_folder, "float32", 0))
    assert cost.head == 64
    assert cost.body == 2 * LAYER


def test_unknown_matrices_have_no_cost(tiny_folder):
    model = load_causal(tiny_folder, "float32")
    model.model.experts = torch.nn.Parameter(torch.zeros(4, 8, 8))
    assert Cost.of(model) is None


def test_step_by_hand():
    work = Work(tokens=10, scored=3, pairs=29)
    full = Cost(100, 0, 50, 7, trains_body=True, trains_head=True)
    assert full.forward(work) == 2 * 100 * 10 + 2 * 50 * 3 + 4 * 7 * 29
    assert full.backward(work) == 2 * full.forward(work)
    lora = Cost(100, 5, 50, 7, trains_body=False, trains_head=False)
    assert lora.forward(work) == full.forward(work) + 2 * 5 * 10
    assert lora.backward(work) == 2 * 100 * 10 + 2 * 50 * 3 + 2 * 2 * 5 * 10 + 2 * 4 * 7 * 29


def test_agrees_with_torchs_counter(tiny_folder):
    length = 24
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager", dtype=torch.float32)
    cost = Cost.of(model)
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=torch.arange(length)[None], use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    work = Work(length, length, length**2)  # this attention computes what the mask then hides
    assert forward.get_total_flops() == cost.forward(work)
    assert backward.get_total_flops() == cost.backward(work)


def test_a_shared_prompt_counts_once():
    batch = collated([([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([7, 8], [9, 9])])
    trunk, first, second, alone = 1 + 2 + 3, 4 + 5, 4, 1 + 2 + 3 + 4
    assert Work.of(batch, 5) == Work(3 + 2 + 1 + 4, 5, trunk + first + second + alone)


def test_decoder_reads_what_it_multiplies(tiny_folder):
    shape = read_shape(tiny_folder)
    decoder = Decoder.of(shape, 4)
    norms = 5 * 64
    assert decoder == Decoder(2 * LAYER + 262 * 64 + norms, 262 * 64, 2 * 2 * 32, 2 * 64, 4)


def test_least_seconds_by_hand():
    decoder = Decoder(weights=100, head=20, kv=4, attention=3, size=2)
    read = 2 * 100 / 10 + 2 * (100 + 4 * 3) / 10
    assert decoder.least_seconds([(2, 2)], flops=1e9, bandwidth=10) == pytest.approx(read)
    prompt = 2 * 80 * 2 + 2 * 20 + 4 * 3 * (1 + 2)
    step = 2 * 100 + 4 * 3 * 3
    assert decoder.least_seconds([(2, 2)], flops=10, bandwidth=1e9) == pytest.approx((prompt + step) / 10)


def test_rows_share_the_reading_of_the_weights():
    decoder = Decoder(weights=100, head=20, kv=0, attention=0, size=2)
    one = decoder.least_seconds([(4, 8)], flops=1e12, bandwidth=10)
    assert decoder.least_seconds([(4, 8)] * 16, flops=1e12, bandwidth=10) == pytest.approx(one)
    assert decoder.least_seconds([(4, 8), (4, 2)], flops=1e12, bandwidth=10) == pytest.approx(one)
