"""What transformers says of the rollouts that an engine drew, and models whose outputs differ visibly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf.types import Prompt, Rollout


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def perturb(model: PreTrainedModel, seed: int, noise: float = 0.05) -> PreTrainedModel:
    """Add noise to every matrix, relative to its spread: another model of the same kind."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return model


@torch.no_grad()
def sharpen(model: PreTrainedModel, factor: float = 6.0) -> PreTrainedModel:
    """Scale the matrices of a freshly drawn model, whose predictions are otherwise all but uniform."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight *= factor
    return model


def save(model: PreTrainedModel, like: Path, folder: Path) -> Path:
    """Write the model with the tokenizer of the folder `like`."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


@torch.no_grad()
def logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Return transformers' log-probabilities of a rollout's tokens, `[len(tokens)]` float32."""
    start = len(rollout.prompt.tokens)
    tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.tokens]])
    logits = model(tokens).logits[0, start - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(1, tokens[0, start:, None]).squeeze(1)


def differences(model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float = 1.0) -> torch.Tensor:
    """Return |engine - transformers| of every sampled token."""
    return torch.cat([(logprobs(model, r, temperature) - torch.tensor(r.logprobs)).abs() for r in rollouts])


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Prompt, max_tokens: int) -> tuple[int, ...]:
    """Return the most likely continuation, token by token with no cache, so that nothing can be stale."""
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    tokens = list(prompt.tokens)
    for _ in range(max_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in ends:
            break
    return tuple(tokens[len(prompt.tokens) :])
