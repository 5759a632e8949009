"""The two losses of PPO (Schulman et al. 2017), as sums over the response tokens: the engine divides once.

All tensors are `[B, T]`; what lies off the mask changes neither a sum nor a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.algorithms.kl import kl_estimate
from rlhf.algorithms.masked import masked_sum


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

    Truncated importance sampling (Ionides 2008) corrects for an engine whose numbers differ from the trainer's.
    """
    return (old_logprobs - rollout_logprobs).detach().exp().clamp(max=cap)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float, weights: Tensor
) -> PolicyLoss:
    """Return the clipped surrogate, sum of -w * min(ratio * A, clip(ratio, 1 - c, 1 + c) * A), and its statistics.

    Schulman et al. 2017, eq. 7; `weights` are importance weights, 1 for none. Only `logprobs` is differentiated.
    """
    old = old_logprobs.detach()
    gain = (advantages * weights).detach().masked_fill(~mask, 0)
    ratio = (logprobs - old).masked_fill(~mask, 0).exp()
    unclipped = -gain * ratio
    clipped = -gain * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(
        loss=torch.maximum(unclipped, clipped).sum(),
        clip_fraction=(clipped > unclipped).sum().to(ratio.dtype),
        approx_kl=masked_sum(kl_estimate(old, logprobs.detach(), "k3"), mask),
        ratio=masked_sum(ratio.detach(), mask),
    )


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
