"""Every objective with a ragged batch for it, and models to train: shared by the tests of both engines."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.engines.objectives import ClippedPolicy, ClippedValue, Preference, RewardModel, Sft
from rlhf.models.loading import load_causal
from rlhf.models.lora import add_lora
from rlhf.models.scalar import load_scalar
from rlhf.recipe.base import Lora, Optimizer
from rlhf.types import Experience, PreferenceBatch, Rows, TokenBatch

OPTIMIZER = Optimizer(learning_rate=1e-3, weight_decay=0.01, max_grad_norm=0.5)
HEAD_RATE = 3e-3


def random_tokens(seed: int, lengths: list[int], prompts: list[int]) -> TokenBatch:
    """Right-padded sequences; row b has `prompts[b]` prompt tokens, and the rest of its length is response."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    columns = torch.arange(width)
    real = columns < torch.tensor(lengths)[:, None]
    response = real & (columns >= torch.tensor(prompts)[:, None])
    tokens = torch.randint(6, 262, (len(lengths), width), generator=generator).masked_fill(~real, 0)
    noise = -2 * torch.rand(tokens.shape, generator=generator) - 4
    return TokenBatch(tokens, real, response, noise.masked_fill(~response, 0))


def token_batch() -> TokenBatch:
    return random_tokens(1, [9, 14, 5, 11, 7], [4, 6, 3, 2, 6])


def preference_batch() -> PreferenceBatch:
    generator = torch.Generator().manual_seed(2)
    return PreferenceBatch(
        chosen=random_tokens(3, [9, 14, 5, 11, 7], [4, 6, 3, 2, 6]),
        rejected=random_tokens(4, [12, 8, 6, 5, 9], [4, 6, 3, 2, 6]),
        margins=torch.tensor([0.0, 0.5, 0.0, 0.2, 0.0]),
        chosen_ref_logprobs=-5 - 40 * torch.rand(5, generator=generator),
        rejected_ref_logprobs=-5 - 40 * torch.rand(5, generator=generator),
    )


def experience() -> Experience:
    """Old log-probabilities and values lie around the fresh model's, so that some tokens are clipped and some not."""
    batch = token_batch()
    generator = torch.Generator().manual_seed(5)

    def drawn(mean: float, spread: float) -> Tensor:
        values = mean + spread * torch.randn(batch.tokens.shape, generator=generator)
        return values.masked_fill(~batch.response_mask, 0)

    return Experience(
        batch=batch,
        scores=torch.randn(len(batch), generator=generator),
        kl=drawn(0, 0.1),
        old_logprobs=drawn(-5.57, 0.2),
        ref_logprobs=drawn(-5.57, 0.2),
        values=drawn(0, 0.5),
        returns=drawn(0, 1),
        advantages=drawn(0, 1),
    )


@dataclass(frozen=True)
class Case:
    objective: Any
    batch: Callable[[], Rows]
    kind: Literal["causal", "scalar"]


CASES = {
    "sft": Case(Sft(), token_batch, "causal"),
    "reward": Case(RewardModel(), preference_batch, "scalar"),
    "preference": Case(Preference(0.1, 0.1), preference_batch, "causal"),
    "policy": Case(ClippedPolicy(0.2, 2.0, 0.9), experience, "causal"),
    "value": Case(ClippedValue(0.02), experience, "scalar"),
}


def build_model(folder: Path, kind: Literal["causal", "scalar"], lora: bool, dtype: str = "float32") -> nn.Module:
    model = load_causal(folder, dtype) if kind == "causal" else load_scalar(folder, dtype, seed=1)
    return add_lora(model, Lora(r=4, alpha=8), kind, seed=1) if lora else model


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that get gradients."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_change(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)
