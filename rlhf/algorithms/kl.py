"""Per-token estimates of a KL divergence from samples."""

from __future__ import annotations

from typing import Literal, assert_never

from torch import Tensor

KlEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(p || ref) at each token sampled from p, the first argument's distribution, in nats.

    With d = log p - log ref (Schulman 2020, "Approximating KL divergence"): k1 = d is unbiased and may be
    negative; k2 = d^2 / 2 is biased, of low variance; k3 = exp(-d) - 1 + d is unbiased and never negative.
    """
    difference = logprobs - ref_logprobs
    match estimator:
        case "k1":
            return difference
        case "k2":
            return difference.square() / 2
        case "k3":
            return (-difference).expm1() + difference
    assert_never(estimator)
