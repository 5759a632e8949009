"""Direct preference optimisation: a policy's own log-probabilities as the reward model."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """Return beta * (log p - log ref) of whole responses, `[P]`: the reward, up to a constant per prompt.

    Rafailov et al. 2023, eq. 5.
    """
    return beta * (logprobs - ref_logprobs)


def dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """Return one loss per pair, `[P]`, from the sums of log-probabilities over the responses, `[P]` each.

    -log sigmoid(m), m the difference of implicit rewards (Rafailov et al. 2023, eq. 7). `label_smoothing` is
    the assumed probability of a swapped label: -(1 - s) log sigmoid(m) - s log sigmoid(-m) (Mitchell 2023, cDPO).
    """
    margins = implicit_rewards(chosen, ref_chosen, beta) - implicit_rewards(rejected, ref_rejected, beta)
    kept = functional.logsigmoid(margins)
    swapped = functional.logsigmoid(-margins)
    return -(1 - label_smoothing) * kept - label_smoothing * swapped
