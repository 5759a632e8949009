"""The losses of the policy-gradient methods, as sums over the response tokens: the engine divides once.

All tensors are `[B, T]`; what lies off the mask changes neither a sum nor a gradient.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, assert_never

import torch
from torch import Tensor

from rlhf.algorithms.kl import KlEstimator, kl_estimate
from rlhf.algorithms.masked import masked_sum

Aggregation = Literal["token", "sequence", "constant"]


class PolicyLoss(NamedTuple):
    """Sums over the mask, scalars: only `loss` carries a gradient.

    clip_fraction counts the tokens whose gradient the clip blocks; approx_kl is k3 of KL(old || new);
    ratio is new over old probability.
    """

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio: Tensor


class ValueLoss(NamedTuple):
    """Sums over the mask, scalars: only `loss` carries a gradient; clip_fraction counts the clipped tokens."""

    loss: Tensor
    clip_fraction: Tensor


def importance_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, cap: float) -> Tensor:
    """Return min(exp(old - rollout), cap), without gradient: the trainer's probability over the sampling engine's.

    Truncated importance sampling (Ionides 2008) corrects for an engine whose numbers differ from the trainer's, and
    for one that sampled with older weights (`rlhf.stages.overlap`).
    """
    return (old_logprobs - rollout_logprobs).detach().exp().clamp(max=cap)


def aggregation_weights(mask: Tensor, aggregation: Aggregation, max_tokens: int) -> Tensor:
    """Return the weight of each token's loss, float32 `[B, T]`; the weighted sum is divided by `aggregation_count`.

    token: 1 for each, so that the loss is the mean over the tokens of the batch (Yu et al. 2025, eq. 8).
    sequence: 1 / length, the mean over sequences of their token means (Shao et al. 2024, eq. 3).
    constant: 1 / max_tokens, the same for every length (Liu et al. 2025, Dr. GRPO).
    """
    match aggregation:
        case "token":
            return torch.ones_like(mask, dtype=torch.float32)
        case "sequence":
            return (1 / mask.sum(dim=1, keepdim=True).clamp(min=1)).float().expand(mask.shape)
        case "constant":
            return torch.full_like(mask, 1 / max_tokens, dtype=torch.float32)
    assert_never(aggregation)


def aggregation_count(mask: Tensor, aggregation: Aggregation) -> float:
    """Return what the weighted sum of a batch is divided by: its response tokens, or its sequences."""
    return float(mask.sum()) if aggregation == "token" else float(len(mask))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: tuple[float, float],
    weights: Tensor,
) -> PolicyLoss:
    """Return the clipped surrogate, sum of -w * min(ratio * A, clip(ratio, 1 - low, 1 + high) * A), and its statistics.

    Schulman et al. 2017, eq. 7; `clip_range` is (low, high), with high > low the clip-higher of Yu et al. 2025;
    `weights` are importance times aggregation weights, 1 for none. Only `logprobs` is differentiated.
    """
    low, high = clip_range
    old = old_logprobs.detach()
    gain = (advantages * weights).detach().masked_fill(~mask, 0)
    ratio = (logprobs - old).masked_fill(~mask, 0).exp()
    unclipped = -gain * ratio
    clipped = -gain * ratio.clamp(1 - low, 1 + high)
    return PolicyLoss(
        loss=torch.maximum(unclipped, clipped).sum(),
        clip_fraction=(clipped > unclipped).sum().to(ratio.dtype),
        approx_kl=masked_sum(kl_estimate(old, logprobs.detach(), "k3"), mask),
        ratio=masked_sum(ratio.detach(), mask),
    )


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: KlEstimator, weights: Tensor) -> Tensor:
    """Return the sum of w * kl_t, differentiable in `logprobs`: the KL to the reference as part of the loss.

    With d = log p - log ref the gradient of k1 is that of log p, whose mean on samples of p is 0: it holds nothing.
    That of k2 is d times it, the gradient of the KL itself; that of k3 is 1 - exp(-d) times it (GRPO, Shao et al.
    2024, eq. 4), bounded above.
    """
    policy, ref = logprobs.masked_fill(~mask, 0), ref_logprobs.detach().masked_fill(~mask, 0)
    return (kl_estimate(policy, ref, estimator) * weights).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float) -> ValueLoss:
    """Return the sum of 0.5 * max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip_range` of the old value.

    The clipped value loss of the PPO reference implementation (Dhariwal et al. 2017, OpenAI Baselines).
    Only `values` is differentiated.
    """
    change = (values - old_values.detach()).masked_fill(~mask, 0)
    error = (values - returns.detach()).masked_fill(~mask, 0)
    clipped_error = error - change + change.clamp(-clip_range, clip_range)
    unclipped, clipped = error.square(), clipped_error.square()
    return ValueLoss(
        loss=0.5 * torch.maximum(unclipped, clipped).sum(),
        clip_fraction=((change.abs() > clip_range) & (clipped > unclipped)).sum().to(error.dtype),
    )
