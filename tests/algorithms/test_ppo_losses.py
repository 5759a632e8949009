import math

import pytest
import torch

from rlhf.algorithms.ppo import (
    aggregation_count,
    aggregation_weights,
    importance_weights,
    kl_loss,
    policy_loss,
    value_loss,
)

CLIP = 0.2
BOTH = (CLIP, CLIP)


def row(*values):
    return torch.tensor([values])


def everywhere(tensor):
    return torch.ones_like(tensor, dtype=torch.bool)


def test_importance_weights_by_hand():
    old = row(math.log(0.5), math.log(0.2), 0.0, 0.0).requires_grad_()
    rollout = row(math.log(0.4), math.log(0.4), -200.0, 0.0)
    weights = importance_weights(old, rollout, 2.0)
    torch.testing.assert_close(weights, row(1.25, 0.5, 2.0, 1.0))
    assert not weights.requires_grad


def test_policy_loss_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1 with advantages 2, -2, 2, -2, 1
    #   min(3, 2.4) = 2.4; min(-3, -2.4) = -3; min(1, 1.6) = 1; min(-1, -1.6) = -1.6; 1.1
    # weights 1, 1, 1, 0.5, 2: -(2.4 - 3 + 1 - 0.8 + 2.2) = -1.8
    ratios = row(1.5, 1.5, 0.5, 0.5, 1.1)
    old = torch.full_like(ratios, -3.0)
    advantages, weights = row(2.0, -2.0, 2.0, -2.0, 1.0), row(1.0, 1.0, 1.0, 0.5, 2.0)
    result = policy_loss(old + ratios.log(), old, advantages, everywhere(ratios), BOTH, weights)
    assert result.loss.item() == pytest.approx(-1.8, abs=1e-5)
    assert result.clip_fraction.item() == 2
    assert result.ratio.item() == pytest.approx(5.1)
    expected_kl = sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1))
    assert result.approx_kl.item() == pytest.approx(expected_kl, abs=1e-5)


def test_at_ratio_1_the_gradient_is_that_of_reinforce():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(6, (3, 4, 1), generator=generator)
    advantages = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 4, generator=generator) < 0.7
    logprobs = logits.log_softmax(-1).gather(-1, targets).squeeze(-1)

    ppo = policy_loss(logprobs, logprobs.detach(), advantages, mask, BOTH, torch.ones_like(advantages)).loss
    (gradient,) = torch.autograd.grad(ppo, logits, retain_graph=True)
    reinforce = -(advantages * logprobs)[mask].sum()
    (expected,) = torch.autograd.grad(reinforce, logits)

    assert gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "blocked"),
    [
        (1.3, 1.0, True),
        (1.3, -1.0, False),
        (0.7, 1.0, False),
        (0.7, -1.0, True),
        (1.19, 1.0, False),
        (0.81, -1.0, False),
    ],
)
def test_clipping_blocks_the_gradient_exactly_when_it_should(ratio, advantage, blocked):
    logprobs = row(math.log(ratio)).requires_grad_()
    result = policy_loss(logprobs, row(0.0), row(advantage), row(True), BOTH, row(1.0))
    result.loss.backward()
    # d/dlogp of -ratio * A is -ratio * A
    assert logprobs.grad.item() == pytest.approx(0 if blocked else -ratio * advantage)
    assert result.clip_fraction.item() == blocked


def test_clip_higher_lets_likely_tokens_grow_further():
    # ratio 1.25 at advantage 2: within 1.28, so 2.5 counts and has a gradient; at 1.2 the clip holds it at 2.4
    for high, loss, gradient in ((0.28, -2.5, -2.5), (0.2, -2.4, 0)):
        logprobs = row(math.log(1.25)).requires_grad_()
        result = policy_loss(logprobs, row(0.0), row(2.0), row(True), (CLIP, high), row(1.0))
        result.loss.backward()
        assert result.loss.item() == pytest.approx(loss)
        assert logprobs.grad.item() == pytest.approx(gradient)
    low = policy_loss(row(math.log(0.75)), row(0.0), row(-2.0), row(True), (CLIP, 0.28), row(1.0))
    assert low.loss.item() == pytest.approx(1.6)


MASK = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
PER_TOKEN = torch.tensor([[9.0, 1, 3, 9, 9], [9, 2, 2, 2, 4], [9, 9, 7, 9, 9]])


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token", (4 + 10 + 7) / 7),
        ("sequence", (2 + 2.5 + 7) / 3),
        ("constant", (4 + 10 + 7) / (3 * 5)),
    ],
)
def test_aggregations_by_hand(aggregation, expected):
    weights = aggregation_weights(MASK, aggregation, max_tokens=5)
    total = (PER_TOKEN * weights).masked_fill(~MASK, 0).sum()
    assert weights.shape == MASK.shape
    assert total.item() / aggregation_count(MASK, aggregation) == pytest.approx(expected)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_aggregations_are_the_same_for_equal_full_lengths(aggregation):
    mask = torch.ones(4, 6, dtype=torch.bool)
    losses = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    total = (losses * aggregation_weights(mask, aggregation, max_tokens=6)).sum()
    assert total.item() / aggregation_count(mask, aggregation) == pytest.approx(losses.mean().item(), abs=1e-6)


def test_a_row_without_response_has_finite_weights():
    weights = aggregation_weights(torch.zeros(1, 3, dtype=torch.bool), "sequence", 4)
    assert weights.isfinite().all()


@pytest.mark.parametrize(
    ("estimator", "loss", "gradient"),
    # d = log 2: k1 log 2 and 1; k2 log(2)^2 / 2 and log 2; k3 1/2 - 1 + log 2 and 1 - 1/2
    [("k1", math.log(2), 1), ("k2", math.log(2) ** 2 / 2, math.log(2)), ("k3", math.log(2) - 0.5, 0.5)],
)
def test_kl_loss_and_gradient_by_hand(estimator, loss, gradient):
    logprobs = row(math.log(0.5), 5.0).requires_grad_()
    ref = row(math.log(0.25), 5.0).requires_grad_()
    result = kl_loss(logprobs, ref, torch.tensor([[True, False]]), estimator, row(3.0, 3.0))
    result.backward()
    assert result.item() == pytest.approx(3 * loss)
    assert logprobs.grad.tolist() == [[pytest.approx(3 * gradient), 0]]
    assert ref.grad is None


@pytest.mark.parametrize(("estimator", "factor"), [("k1", 0.0), ("k2", 1.0)])
def test_expected_gradient_of_the_kl_loss_on_samples_of_the_policy(estimator, factor):
    """k2's is that of the KL itself; k1's is none at all. Over the whole vocabulary, weighted by probability."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(1, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    loss = kl_loss(logprobs, ref, torch.ones(1, 6, dtype=torch.bool), estimator, logprobs.exp().detach())
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (divergence,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits)
    torch.testing.assert_close(found, factor * divergence)


def test_policy_loss_differentiates_the_new_logprobs_only():
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(4)]
    logprobs, old, advantages, weights = tensors
    result = policy_loss(logprobs, old, advantages, everywhere(logprobs), BOTH, weights)
    assert not any(value.requires_grad for value in result[1:])
    result.loss.backward()
    assert logprobs.grad is not None
    assert all(tensor.grad is None for tensor in tensors[1:])


def test_value_loss_by_hand():
    # returns 1; old values 0; values 0.5 -> clipped 0.2: errors 0.25 and 0.64, the worse counts
    # values -0.5 -> clipped -0.2: errors 2.25 and 1.44; values 0.1 is inside: 0.81 twice
    values = row(0.5, -0.5, 0.1)
    result = value_loss(values, torch.zeros(1, 3), torch.ones(1, 3), everywhere(values), CLIP)
    assert result.loss.item() == pytest.approx(0.5 * (0.64 + 2.25 + 0.81))
    assert result.clip_fraction.item() == 1


@pytest.mark.parametrize(
    ("value", "gradient"),
    [(0.5, 0.0), (-0.5, -1.5), (0.1, -0.9)],  # moved too far towards the return; away from it; a little
)
def test_value_clipping_blocks_the_gradient_exactly_when_it_should(value, gradient):
    values = row(value).requires_grad_()
    value_loss(values, row(0.0), row(1.0), row(True), CLIP).loss.backward()
    assert values.grad.item() == pytest.approx(gradient)


def test_value_loss_differentiates_the_new_values_only():
    values, old, returns = (torch.randn(2, 3, requires_grad=True) for _ in range(3))
    result = value_loss(values, old, returns, everywhere(values), CLIP)
    assert not result.clip_fraction.requires_grad
    result.loss.backward()
    assert values.grad is not None
    assert old.grad is None
    assert returns.grad is None


def test_losses_are_sums_so_micro_batches_add_up():
    generator = torch.Generator().manual_seed(1)
    a, b, c, d = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = torch.rand(6, 5, generator=generator) < 0.6

    def both(rows):
        policy = policy_loss(a[rows], b[rows], c[rows], mask[rows], BOTH, d[rows].exp())
        return torch.stack([*policy, *value_loss(a[rows], b[rows], c[rows], mask[rows], CLIP)])

    torch.testing.assert_close(both(slice(0, 2)) + both(slice(2, 6)), both(slice(0, 6)))
