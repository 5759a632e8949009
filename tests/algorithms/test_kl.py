import math

import pytest
import torch

from rlhf.algorithms.kl import kl_estimate


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [math.log(2), -math.log(2), 0]),
        ("k2", [math.log(2) ** 2 / 2, math.log(2) ** 2 / 2, 0]),
        ("k3", [1 / 2 - 1 + math.log(2), 2 - 1 - math.log(2), 0]),
    ],
)
def test_by_hand(estimator, expected):
    logprobs = torch.tensor([0.5, 0.25, 0.3]).log()
    ref_logprobs = torch.tensor([0.25, 0.5, 0.3]).log()
    torch.testing.assert_close(kl_estimate(logprobs, ref_logprobs, estimator), torch.tensor(expected))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_over_the_first_distribution_is_the_divergence(estimator):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert (p * kl_estimate(p.log(), q.log(), estimator)).sum().item() == pytest.approx(expected)


def test_k2_agrees_to_second_order():
    p = torch.tensor([0.5, 0.5], dtype=torch.float64)
    q = torch.tensor([0.501, 0.499], dtype=torch.float64)
    k1, k2 = ((p * kl_estimate(p.log(), q.log(), estimator)).sum().item() for estimator in ("k1", "k2"))
    assert k2 == pytest.approx(k1, rel=1e-5)


def test_k3_is_never_negative_even_for_tiny_differences():
    difference = torch.cat([torch.logspace(-12, 1, 200), -torch.logspace(-12, 1, 200)])
    assert (kl_estimate(difference, torch.zeros_like(difference), "k3") >= 0).all()
