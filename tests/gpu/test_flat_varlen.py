"""Flat batches through torch's varlen kernel on a GPU, in bfloat16, against padded ones in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.engines.scoring import response_logprobs
from rlhf.models.flat_attention import runs_flat, use_flat_attention
from rlhf.types import TokenBatch

pytestmark = pytest.mark.gpu

SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {"Llama": {}, "Qwen3": {"head_dim": 64}, "Mistral": {"sliding_window": 96}}


def batch() -> TokenBatch:
    """Two prompts with four responses each, and two texts of their own, of 40 to 900 tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts = [200, 200, 200, 200, 17, 17, 17, 17, 1, 64]
    responses = [30, 90, 300, 5, 500, 23, 60, 128, 899, 40]
    lengths = torch.tensor(prompts) + torch.tensor(responses)
    columns = torch.arange(int(lengths.max()))
    real, response = columns < lengths[:, None], columns >= torch.tensor(prompts)[:, None]
    tokens = torch.randint(6, 512, real.shape, generator=generator).masked_fill(~real, 0)
    for row in (1, 2, 3, 5, 6, 7):
        tokens[row, : prompts[row]] = tokens[row // 4 * 4, : prompts[row]]
    return TokenBatch(tokens, real, real & response, torch.zeros(real.shape)).to(torch.device("cuda"))


def said_and_learnt(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logprobs of the batch, and the gradient of a weighted sum of them as one vector."""
    rows = batch()
    logprobs = response_logprobs(model, rows)
    weights = torch.linspace(-1, 1, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    (logprobs * weights).sum().backward()
    grads = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return logprobs.detach()[rows.response_mask], torch.cat(grads)


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_as_near_to_float32_as_padded_batches_are(name: str) -> None:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **ARCHITECTURES[name]})
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").cuda().eval()
    padded, flat = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    use_flat_attention(flat)
    assert runs_flat(flat)
    assert not runs_flat(padded)
    truth, true_grad = said_and_learnt(exact)
    apart = {}
    for kind, model in (("padded", padded), ("flat", flat)):
        said, grad = said_and_learnt(model)
        apart[kind] = ((said - truth).abs().mean(), (grad - true_grad).norm() / true_grad.norm())
    for measured, usual in zip(apart["flat"], apart["padded"], strict=True):
        assert measured < 1.5 * usual
