"""From the score of a whole response to an advantage for each of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.masked import last_index


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return `[B, T]` rewards: -kl_coef * kl on each response token, plus the score at the last, 0 elsewhere.

    scores `[B]`, kl `[B, T]` per-token KL to the reference, mask `[B, T]` the response (Ouyang et al. 2022,
    eq. 2). A row without response gets no reward.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    is_last = positions == last_index(mask)[:, None]
    penalties = (-kl_coef * kl).masked_fill(~mask, 0)
    return torch.where(is_last, penalties + scores[:, None], penalties)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), both `[B, T]`, 0 off the mask and without gradient.

    Generalised advantage estimation (Schulman et al. 2016, eq. 16): A_t = delta_t + gamma * lambda * A_{t+1}
    with delta_t = r_t + gamma * V_{t+1} - V_t, and returns A_t + V_t. The value after a row's last response
    token is 0. t + 1 means the next True position: gaps in the mask take no time.
    """
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(len(values))
    next_advantage = next_value
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * gae_lambda * next_advantage
        advantages[:, t] = advantage.masked_fill(~here, 0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, values[:, t], next_value)
    return advantages, (advantages + values).masked_fill(~mask, 0)
