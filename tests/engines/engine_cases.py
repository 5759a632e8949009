"""Every objective with a ragged batch for it, and models to train: shared by the tests of both engines."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf.algorithms.preference import (
    PreferenceLoss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf.engines.objectives import RewardModel, Sft
from rlhf.engines.policy_objectives import ClippedPolicy, ClippedValue
from rlhf.engines.preference_objectives import Kto, Preference
from rlhf.models.flat_attention import use_flat_attention
from rlhf.models.loading import load_causal
from rlhf.models.scalar import load_scalar
from rlhf.models.tuning import apply_tuning
from rlhf.recipe.base import Optimizer
from rlhf.recipe.tuning_schema import Lora
from rlhf.types import Experience, LabelledBatch, PreferenceBatch, Rows, TokenBatch, ValueBatch

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


def labelled_batch() -> LabelledBatch:
    """Kept below the reference by the reference point in some rows and above it in others."""
    pairs = preference_batch()
    desirable = torch.tensor([True, False, True, False, False])
    return LabelledBatch(pairs.chosen, desirable, pairs.chosen_ref_logprobs, torch.full((5,), 3.0))


def drawn(seed: int, mean: float, spread: float) -> Tensor:
    """Normal values on the response tokens of `token_batch`, 0 elsewhere."""
    mask = token_batch().response_mask
    values = mean + spread * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    return values.masked_fill(~mask, 0)


def experience() -> Experience:
    """Old log-probabilities lie around the fresh model's, so that some tokens are clipped and some not."""
    batch = token_batch()
    return Experience(
        batch=batch,
        scores=torch.randn(len(batch), generator=torch.Generator().manual_seed(5)),
        kl=drawn(6, 0, 0.1),
        old_logprobs=drawn(7, -5.57, 0.2),
        ref_logprobs=drawn(8, -5.57, 0.2),
        advantages=drawn(9, 0, 1),
    )


def value_batch() -> ValueBatch:
    """Old values lie around the fresh model's, so that some are clipped and some not."""
    return ValueBatch(token_batch(), values=drawn(10, 0, 0.5), returns=drawn(11, 0, 1))


@dataclass(frozen=True)
class Case:
    objective: Any
    batch: Callable[[], Rows]
    kind: Literal["causal", "scalar"]


PAIR_LOSS_CASES: dict[str, tuple[Callable[..., PreferenceLoss], dict[str, float]]] = {
    "dpo": (dpo_loss, {"beta": 0.1, "label_smoothing": 0.1}),
    "dpo_nll": (dpo_loss, {"beta": 2.0, "length_normalised": True, "nll_coef": 0.5}),
    "robust_dpo": (robust_dpo_loss, {"beta": 0.1, "label_noise": 0.2}),
    "ipo": (ipo_loss, {"beta": 0.1}),
    "hinge": (hinge_loss, {"beta": 0.05}),
    "simpo": (simpo_loss, {"beta": 2.0, "gamma": 1.0}),
    "orpo": (orpo_loss, {"beta": 0.5}),
}

CASES = {
    "sft": Case(Sft(), token_batch, "causal"),
    "reward": Case(RewardModel(), preference_batch, "scalar"),
    **{
        name: Case(Preference(partial(loss, **settings)), preference_batch, "causal")
        for name, (loss, settings) in PAIR_LOSS_CASES.items()
    },
    "kto": Case(Kto(0.1, 1.0, 0.7), labelled_batch, "causal"),
    "policy": Case(ClippedPolicy(0.2, 0.2, 2.0, 0.9, "token", 12, 0.0, "k1"), experience, "causal"),
    "policy_token_k1": Case(ClippedPolicy(0.1, 0.3, 1.5, 1.0, "token", 12, 0.5, "k1"), experience, "causal"),
    "policy_sequence_k3": Case(ClippedPolicy(0.2, 0.28, 2.0, 0.9, "sequence", 12, 0.5, "k3"), experience, "causal"),
    "policy_constant_k2": Case(ClippedPolicy(0.2, 0.2, 2.0, 1.0, "constant", 12, 0.5, "k2"), experience, "causal"),
    "value": Case(ClippedValue(0.02), value_batch, "scalar"),
}


def build_model(
    folder: Path, kind: Literal["causal", "scalar"], lora: bool, dtype: str = "float32", flat: bool = False
) -> nn.Module:
    model = load_causal(folder, dtype) if kind == "causal" else load_scalar(folder, dtype, seed=1)
    if flat:
        use_flat_attention(model)
    return apply_tuning(model, Lora(r=4, alpha=8), seed=1) if lora else model


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that get gradients."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def largest_change(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)
