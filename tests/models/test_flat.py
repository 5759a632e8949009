"""Flat batches say and learn what padded ones do, token for token, for every architecture that takes them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf.engines import scoring
from rlhf.engines.scoring import response_logprobs, response_values, sequence_scores
from rlhf.models import flat_attention
from rlhf.models.flat import Segment, flatten
from rlhf.models.flat_attention import runs_flat, use_flat_attention
from rlhf.models.recompute import recompute_activations
from rlhf.models.scalar import load_scalar
from rlhf.types import TokenBatch

SMALL = {
    "vocab_size": 262,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Qwen3": {},
    "Mistral": {"sliding_window": 8},
    "Gemma": {"head_dim": 16},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 8},
    "Phi3": {},
    "Mixtral": {"num_local_experts": 4},
    "GPT2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "GPTNeoX": {},
    "Olmo2": {},
    "Granite": {},
    "Cohere": {},
    "Starcoder2": {},
}
PADDED = {"Gemma2": {"head_dim": 16}, "Falcon": {}, "Qwen3Next": {}, "StableLm": {}}
"""Soft-capped scores, no registered attention, layers that carry a state."""


def build(name: str, settings: dict[str, Any]) -> PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **settings})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def batch() -> TokenBatch:
    """Three prompts of 5, 20 and 2 tokens with one, three and two responses, and a text without prompt."""
    prompts, responses = [5, 20, 2, 20, 2, 20, 0], [15, 11, 8, 16, 20, 1, 9]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(prompts) + torch.tensor(responses)
    columns = torch.arange(int(lengths.max()))
    real, response = columns < lengths[:, None], columns >= torch.tensor(prompts)[:, None]
    tokens = torch.randint(6, 262, real.shape, generator=generator).masked_fill(~real, 0)
    for row, first in ((3, 1), (5, 1), (4, 2)):
        tokens[row, : prompts[row]] = tokens[first, : prompts[first]]
    return TokenBatch(tokens, real, real & response, torch.zeros(real.shape))


def said_and_learnt(
    model: nn.Module, score: Callable[[nn.Module, TokenBatch], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the model says of the batch, and the gradient of a weighted sum of it."""
    model.zero_grad()
    found = score(model, batch())
    (found * torch.linspace(0.5, 1.5, found.numel()).view(found.shape)).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_flat_equals_padded(model: PreTrainedModel, score: Callable[[nn.Module, TokenBatch], Tensor]) -> None:
    wanted, gradients = said_and_learnt(model, score)
    use_flat_attention(model)
    assert runs_flat(model)
    found, learnt = said_and_learnt(model, score)
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    assert learnt.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(learnt[name], gradient, rtol=1e-4, atol=1e-6 * float(largest), msg=name)


def test_a_shared_prompt_stands_once_and_padding_nowhere() -> None:
    flat = flatten(batch())
    assert flat.segments == (
        Segment(0, 20),
        Segment(20, 40),
        Segment(40, 51, (20, 40)),
        Segment(51, 67, (20, 40)),
        Segment(67, 68, (20, 40)),
        Segment(68, 70),
        Segment(70, 78, (68, 70)),
        Segment(78, 98, (68, 70)),
        Segment(98, 107),
    )
    assert flat.tokens.shape == (1, 107)
    whole = batch()
    assert torch.equal(flat.tokens[0][flat.index][whole.attention_mask], whole.tokens[whole.attention_mask])
    columns = torch.arange(whole.width).expand_as(whole.tokens)
    assert torch.equal(flat.positions[0][flat.index][whole.attention_mask], columns[whole.attention_mask])


def test_keys_of_a_segment_are_its_prompts_and_its_own() -> None:
    flat = flatten(batch())
    assert flat.key_index is not None
    bounds = flat.key_bounds.tolist()
    seen = [flat.key_index[start:stop].tolist() for start, stop in pairwise(bounds)]
    assert seen[2] == [*range(20, 40), *range(40, 51)]
    assert seen[8] == list(range(98, 107))
    assert flat.query_bounds.tolist() == [0, 20, 40, 51, 67, 68, 70, 78, 98, 107]
    assert flatten(batch().select([0, 1, 2])).key_index is None


@pytest.mark.parametrize("logits", ["whole", "in parts"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flat_equals_padded(name: str, logits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LARGE", 0 if logits == "in parts" else 10**9)
    assert_flat_equals_padded(build(name, ARCHITECTURES[name]), response_logprobs)


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
@pytest.mark.parametrize("block", [1, 7])
def test_segments_cut_into_blocks_of_queries_say_the_same(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_attention, "BLOCK", block)
    assert_flat_equals_padded(build(name, ARCHITECTURES[name]), response_logprobs)


def test_a_part_sees_the_prefix_and_what_stands_before_it() -> None:
    parts = list(Segment(40, 51, (20, 40)).cut(4))
    assert parts == [Segment(40, 44, (20, 40)), Segment(44, 48, (20, 40), 4), Segment(48, 51, (20, 40), 8)]
    assert [part.keys for part in parts] == [24, 28, 31]


@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_long_segments_take_torchs_attention_and_say_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_attention, "SHORT", {})
    assert_flat_equals_padded(build(name, ARCHITECTURES[name]), response_logprobs)


def test_activations_computed_again_are_the_same() -> None:
    model = build("Llama", {})
    wanted = said_and_learnt(model, response_logprobs)
    use_flat_attention(model)
    recompute_activations(model)
    model.train()
    found = said_and_learnt(model, response_logprobs)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=5e-6)
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("score", [response_values, sequence_scores])
def test_a_scalar_model_too(tiny_folder: Path, score: Callable[[nn.Module, TokenBatch], Tensor]) -> None:
    assert_flat_equals_padded(load_scalar(tiny_folder, "float32", seed=1), score)


@pytest.mark.parametrize("name", PADDED)
def test_what_cannot_run_flat_stays_padded(name: str) -> None:
    model = build(name, PADDED[name])
    use_flat_attention(model)
    assert not runs_flat(model)


def test_dropout_of_the_attention_stays_padded() -> None:
    model = build("Llama", {"attention_dropout": 0.1})
    use_flat_attention(model)
    assert not runs_flat(model)


def test_a_padded_batch_is_refused_rather_than_read_without_its_mask() -> None:
    model = build("Llama", {})
    use_flat_attention(model)
    with pytest.raises(TypeError, match="attends to a flat batch, and got none"):
        model(input_ids=batch().tokens, attention_mask=batch().attention_mask)


def test_bfloat16_stays_as_near_to_float32_as_padded(tiny_folder: Path) -> None:
    exact = response_logprobs(build("Llama", {}), batch())
    model = build("Llama", {}).to(torch.bfloat16)
    padded = (response_logprobs(model, batch()) - exact).abs().max()
    use_flat_attention(model)
    assert (response_logprobs(model, batch()) - exact).abs().max() < 2 * padded


def test_the_saved_configuration_says_nothing_of_it(tmp_path: Path) -> None:
    model = build("Llama", {})
    use_flat_attention(model)
    model.save_pretrained(tmp_path)
    assert "rlhf_flat" not in (tmp_path / "config.json").read_text()
