"""Garbage columns at the end of a batch change no loss, no statistic and no gradient."""

import pytest
import torch

from rlhf.algorithms.advantages import gae, to_tokens, token_rewards, whitened_to_go
from rlhf.algorithms.logprobs import sequence_logprobs
from rlhf.algorithms.masked import last_index, masked_mean, masked_sum, whiten
from rlhf.algorithms.ppo import aggregation_weights, importance_weights, kl_loss, policy_loss, value_loss

ROWS, WIDTH, EXTRA = 4, 7, 3


def pad(tensor, filler):
    return torch.cat([tensor, torch.full((ROWS, EXTRA), filler, dtype=tensor.dtype)], dim=1)


@pytest.fixture(params=[0.0, 1e30, -1e4, float("inf"), float("nan")])
def pair(request):
    """Two float batches and a mask, as they are and with garbage columns appended."""
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(ROWS, WIDTH, generator=generator) for _ in range(5)]
    mask = torch.rand(ROWS, WIDTH, generator=generator) < 0.6
    padded = [pad(tensor, request.param) for tensor in tensors]
    return (*tensors, mask), (*padded, pad(mask, False))


def test_reductions(pair):
    for function in (masked_sum, masked_mean):
        short, long = (function(batch[0], batch[-1]) for batch in pair)
        torch.testing.assert_close(short, long)
    for function in (sequence_logprobs, lambda values, mask: last_index(mask)):
        short, long = (function(batch[0], batch[-1]) for batch in pair)
        torch.testing.assert_close(short, long)


def test_token_values(pair):
    def results(a, b, c, d, e, mask):
        rewards = token_rewards(torch.arange(4.0), a, mask, 0.1)
        spread = to_tokens(torch.arange(4.0), mask)
        return rewards, spread, whiten(a, mask), whitened_to_go(a, mask, 0.9), *gae(b, c, mask, 0.9, 0.8)

    for short, long in zip(results(*pair[0]), results(*pair[1]), strict=True):
        torch.testing.assert_close(long[:, :WIDTH], short)
        assert long[:, WIDTH:].count_nonzero() == 0


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_losses_and_gradients(pair, aggregation):
    def results(new, old, advantages, rollout, returns, mask):
        new = new.clone().requires_grad_()
        weights = importance_weights(old, rollout, 2.0) * aggregation_weights(mask, aggregation, 9)
        policy = policy_loss(new, old, advantages, mask, (0.2, 0.3), weights)
        (policy_gradient,) = torch.autograd.grad(policy.loss, new)
        kl = kl_loss(new, rollout, mask, "k3", aggregation_weights(mask, aggregation, 9))
        (kl_gradient,) = torch.autograd.grad(kl, new)
        value = value_loss(new, old, returns, mask, 0.2)
        (value_gradient,) = torch.autograd.grad(value.loss, new)
        return [*policy, *value, kl], [policy_gradient, value_gradient, kl_gradient]

    (short_sums, short_gradients), (long_sums, long_gradients) = (results(*batch) for batch in pair)
    for short, long in zip(short_sums, long_sums, strict=True):
        torch.testing.assert_close(short, long)
    for short, long in zip(short_gradients, long_gradients, strict=True):
        torch.testing.assert_close(long[:, :WIDTH], short)
        assert long[:, WIDTH:].count_nonzero() == 0
