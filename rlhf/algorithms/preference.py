"""Losses on preferences: siblings with one signature, one value per pair (`[P]`), picked by the recipe's `kind`.

Nothing depends on the other pairs of a batch, so that cutting a batch into passes never changes a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class PairLogprobs(NamedTuple):
    """Sums of log-probabilities over whole completions, and the completions' tokens; `[P]` each.

    Losses without a reference do not read `ref_*`.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor


class PreferenceLoss(NamedTuple):
    """The loss of each pair and the loss's own implicit reward of either completion; `[P]` each."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """Return beta * (log p - log ref) of whole responses, `[P]`: the reward, up to a constant per prompt.

    Rafailov et al. 2023, eq. 5.
    """
    return beta * (logprobs - ref_logprobs)


def token_means(pairs: PairLogprobs) -> PairLogprobs:
    """Return the pairs with means per token in place of sums, as if every completion had one token."""
    chosen, rejected = pairs.chosen_lengths.clamp(min=1), pairs.rejected_lengths.clamp(min=1)
    return PairLogprobs(
        pairs.chosen / chosen,
        pairs.rejected / rejected,
        pairs.ref_chosen / chosen,
        pairs.ref_rejected / rejected,
        torch.ones_like(chosen),
        torch.ones_like(rejected),
    )


def dpo_loss(
    pairs: PairLogprobs,
    beta: float,
    label_smoothing: float = 0.0,
    length_normalised: bool = False,
    nll_coef: float = 0.0,
) -> PreferenceLoss:
    """-log sigmoid(m), m the difference of implicit rewards (Rafailov et al. 2023, eq. 7).

    label_smoothing s is the assumed probability of a swapped label: -(1 - s) log sigmoid(m) - s log sigmoid(-m)
    (cDPO, Mitchell 2023). length_normalised takes log-ratios per token. nll_coef adds that many times the chosen
    completion's cross-entropy per token, over the tokens of its own pair (Pang et al. 2024), where TRL takes
    the mean over all chosen tokens of a batch.
    """
    chosen, rejected = _rewards(token_means(pairs) if length_normalised else pairs, beta)
    kept, swapped = functional.logsigmoid(chosen - rejected), functional.logsigmoid(rejected - chosen)
    loss = -(1 - label_smoothing) * kept - label_smoothing * swapped
    return PreferenceLoss(loss - nll_coef * token_means(pairs).chosen, chosen, rejected)


def robust_dpo_loss(pairs: PairLogprobs, beta: float, label_noise: float) -> PreferenceLoss:
    """DPO's loss, unbiased under labels that are flipped with probability e = label_noise.

    [(1 - e) l(m) - e l(-m)] / (1 - 2e) with l(m) = -log sigmoid(m) (Chowdhury et al. 2024): its mean over the
    flips is l of the true label. It may be negative.
    """
    chosen, rejected = _rewards(pairs, beta)
    kept, swapped = functional.logsigmoid(chosen - rejected), functional.logsigmoid(rejected - chosen)
    loss = (label_noise * swapped - (1 - label_noise) * kept) / (1 - 2 * label_noise)
    return PreferenceLoss(loss, chosen, rejected)


def ipo_loss(pairs: PairLogprobs, beta: float) -> PreferenceLoss:
    """(h - 1 / (2 beta))^2, h the difference of log-ratios per token (Azar et al. 2023, eq. 17).

    Per token and not per completion as in the authors' experiments and in TRL. The rewards are the log-ratios per
    token themselves, so their margin is what goes to 1 / (2 beta).
    """
    chosen, rejected = _rewards(token_means(pairs), 1.0)
    return PreferenceLoss((chosen - rejected - 1 / (2 * beta)).square(), chosen, rejected)


def hinge_loss(pairs: PairLogprobs, beta: float) -> PreferenceLoss:
    """max(0, 1 - m), m as in DPO (Zhao et al. 2023; Liu et al. 2023)."""
    chosen, rejected = _rewards(pairs, beta)
    return PreferenceLoss((1 - (chosen - rejected)).relu(), chosen, rejected)


def simpo_loss(pairs: PairLogprobs, beta: float, gamma: float) -> PreferenceLoss:
    """-log sigmoid(m - gamma), m the difference of beta * log p per token; no reference (Meng et al. 2024, eq. 6)."""
    means = token_means(pairs)
    chosen, rejected = beta * means.chosen, beta * means.rejected
    return PreferenceLoss(-functional.logsigmoid(chosen - rejected - gamma), chosen, rejected)


def orpo_loss(pairs: PairLogprobs, beta: float) -> PreferenceLoss:
    """Cross-entropy of the chosen completion - beta * log sigmoid(log odds ratio) (Hong et al. 2024, eq. 6 and 7).

    The odds are p / (1 - p), p the geometric mean of the token probabilities; the rewards are their logarithms. The
    cross-entropy is per token of the pair's own completion, where TRL takes the mean over all tokens of a batch, those
    of the prompts included.
    """
    means = token_means(pairs)
    chosen, rejected = _log_odds(means.chosen), _log_odds(means.rejected)
    return PreferenceLoss(-means.chosen - beta * functional.logsigmoid(chosen - rejected), chosen, rejected)


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Return w (1 - sigmoid(+-beta (r - kl))) of single completions, `[B]`, r = log p - log ref, + where desirable.

    Ethayarajh et al. 2024, eq. 7. logprobs and ref_logprobs `[B]` are sums over the completion, `kl` `[B]` is the
    reference point z0 and gets no gradient.
    """
    gain = implicit_rewards(logprobs, ref_logprobs, beta) - beta * kl.detach()
    weights = torch.where(desirable, desirable_weight, undesirable_weight)
    return weights * torch.sigmoid(torch.where(desirable, -gain, gain))


PairLoss = Callable[[PairLogprobs], PreferenceLoss]
PAIR_LOSSES: dict[str, Callable[..., PreferenceLoss]] = {
    "dpo": dpo_loss,
    "robust_dpo": robust_dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
}
"""The recipe's `kind` -> its loss, whose settings have the names of the recipe's keys."""


def _rewards(pairs: PairLogprobs, beta: float) -> tuple[Tensor, Tensor]:
    chosen = implicit_rewards(pairs.chosen, pairs.ref_chosen, beta)
    return chosen, implicit_rewards(pairs.rejected, pairs.ref_rejected, beta)


def _log_odds(logprobs: Tensor) -> Tensor:
    """Return log(p / (1 - p)); p is kept off 1 by the rounding unit, so that the odds stay finite."""
    below = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    return below - (-torch.expm1(below)).log()
