"""What travels between processes: it comes back as it was, its contents beside the stream, large values put once."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import numpy as np
import pytest
import ray
import torch
from replicas_made import PROMPTS, SEEDS, expected

from actors.objects import Drawn, Pickled, Shipped, byte_count
from rlhf.types import Experience, TokenBatch, TokenScores


def test_drawn_responses_come_back_as_they_were():
    rollouts = expected()[:4]
    drawn = pickle.loads(pickle.dumps(Drawn.of(rollouts)))
    assert list(drawn.rollouts(PROMPTS[:2], SEEDS[:2])) == rollouts
    assert list(Drawn.of([]).rollouts([], [])) == []


def token_batch(rows: int = 3, width: int = 5) -> TokenBatch:
    mask = torch.arange(width) < torch.arange(1, rows + 1)[:, None]
    return TokenBatch(torch.arange(rows * width).reshape(rows, width), mask, ~mask, torch.randn(rows, width))


def same(left: Any, right: Any) -> bool:
    """Compare dataclasses of tensors, dtypes included."""
    assert type(left) is type(right)
    for name, value in vars(left).items():
        other = getattr(right, name)
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (other.dtype, other.shape)
            assert torch.equal(value, other)
        else:
            assert same(value, other)
    return True


@pytest.mark.parametrize("out_of_band", [False, True])
def test_batches_come_back_with_dtypes_and_masks(out_of_band):
    batch = token_batch()
    experience = Experience(batch, torch.randn(3), *(torch.randn(3, 5, requires_grad=True) for _ in range(4)))
    half = TokenScores(torch.randn(3, 5).bfloat16(), torch.randn(3, 5).T.contiguous().T)
    for value in (batch, experience, half, batch.select([])):
        buffers: list[pickle.PickleBuffer] | None = [] if out_of_band else None
        data = pickle.dumps(value, 5, buffer_callback=buffers.append if buffers is not None else None)
        again = pickle.loads(data, buffers=buffers)
        assert same(value, again)
    tensors = len(pickle.dumps(batch, 5, buffer_callback=lambda _: None))
    assert tensors < 600  # the contents are not in the stream


@pytest.mark.ray
def test_a_large_batch_is_put_once_and_a_small_one_travels_with_the_call(local_ray):
    shipped = Shipped(inline_bytes=1000)
    small, large = token_batch(), token_batch(20, 30)
    assert byte_count(small) == 3 * 5 * (8 + 1 + 1 + 4)
    assert isinstance(shipped(small), Pickled)
    assert shipped(small) is shipped(small)
    assert same(pickle.loads(pickle.dumps(shipped(small))), small)
    reference = shipped(large)
    assert shipped(large) is reference
    assert shipped(token_batch(20, 30)) != reference
    assert same(ray.get(reference, timeout=60), large)
    del small, large
    gc.collect()
    assert not shipped.parcels


def test_read_only_buffers_become_tensors_without_a_copy():
    batch = token_batch()
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(batch, 5, buffer_callback=buffers.append)
    shared = [bytes(buffer.raw()) for buffer in buffers]
    again = pickle.loads(data, buffers=shared)
    assert same(batch, again)
    assert again.tokens.data_ptr() == np.frombuffer(shared[0], np.int64).ctypes.data
