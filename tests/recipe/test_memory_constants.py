"""The memory model counts with the sizes that the attention really cuts by."""

import torch

from rlhf.models import flat_attention
from rlhf.recipe import activations


def test_attention_is_counted_as_it_is_cut():
    of_weights = {dtype.itemsize: keys for dtype, keys in flat_attention.SHORT.items()}
    assert of_weights == activations.SHORT == {torch.float32.itemsize: 512, torch.bfloat16.itemsize: 1024}
    assert flat_attention.BLOCK == activations.BLOCK
