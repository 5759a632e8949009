"""From the score of a whole response to an advantage for each of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algorithms.masked import last_index, whiten

STD_FLOOR = 1e-4
"""Added to a group's standard deviation, so that scores that are almost equal are not blown up to size 1."""


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


def group_centred(scores: Tensor, groups: Tensor) -> Tensor:
    """Return s_i - mean(s of i's group), `[B]`, from `[B]` scores: Dr. GRPO (Liu et al. 2025).

    groups `[B]` int64 numbers the group (the prompt) of each row from 0; rows may stand in any order.
    """
    exact, sizes = scores.double(), _sizes(groups)
    means = _sums(exact, groups) / sizes
    return (exact - means[groups]).to(scores.dtype)


def group_normalised(scores: Tensor, groups: Tensor) -> Tensor:
    """Return (s_i - mean) / std of i's group, `[B]`, from `[B]` scores: GRPO (Shao et al. 2024, section 4.1.2).

    std is the sample standard deviation (n - 1) plus STD_FLOOR; groups as in `group_centred`, of 2 rows or more.
    """
    centred = group_centred(scores, groups).double()
    variances = _sums(centred.square(), groups) / (_sizes(groups) - 1)
    return (centred / (variances.sqrt() + STD_FLOOR)[groups]).to(scores.dtype)


def leave_one_out(scores: Tensor, groups: Tensor) -> Tensor:
    """Return s_i - mean(s of the others of i's group), `[B]`, from `[B]` scores: RLOO (Ahmadian et al. 2024).

    That is n / (n - 1) times `group_centred`; groups as there, of n >= 2 rows.
    """
    sizes = _sizes(groups)[groups]
    return (group_centred(scores, groups).double() * sizes / (sizes - 1)).to(scores.dtype)


def to_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """Give every response token the advantage of its sequence: `[B]` -> `[B, T]`, 0 off the mask."""
    return torch.where(mask, advantages[:, None], 0)


def whitened_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return the rewards to go R_t = r_t + gamma * R_{t+1}, whitened over all tokens of the batch, `[B, T]`.

    REINFORCE++ (Hu et al. 2025); rewards `[B, T]` as of `token_rewards`. 0 off the mask.
    """
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, gae_lambda=1.0)
    return whiten(to_go, mask)


def _sizes(groups: Tensor) -> Tensor:
    return torch.bincount(groups)


def _sums(values: Tensor, groups: Tensor) -> Tensor:
    return values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)
