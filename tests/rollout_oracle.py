"""What transformers says of the rollouts that an engine drew, and models whose outputs differ visibly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf.types import Rollout


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


def differences(model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float = 1.0) -> torch.Tensor:
    """Return |engine - transformers| of the log-probability of every sampled token."""
    return torch.cat([_difference(model, rollout, temperature) for rollout in rollouts])


def is_greedy(model: PreTrainedModel, rollout: Rollout) -> bool:
    """Return whether each token is the most likely one after those before it: what greedy decoding would give."""
    return _logits(model, rollout).argmax(-1).tolist() == list(rollout.tokens)


def _difference(model: PreTrainedModel, rollout: Rollout, temperature: float) -> torch.Tensor:
    logprobs = (_logits(model, rollout) / temperature).log_softmax(-1)
    return (logprobs.gather(1, torch.tensor(rollout.tokens)[:, None]).squeeze(1) - torch.tensor(rollout.logprobs)).abs()


@torch.no_grad()
def _logits(model: PreTrainedModel, rollout: Rollout) -> torch.Tensor:
    """Return the logits that predict the rollout's tokens, `[len(tokens), V]` float32; no cache, so none is stale."""
    start = len(rollout.prompt.tokens)
    tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.tokens]])
    return model(tokens).logits[0, start - 1 : -1].float()
