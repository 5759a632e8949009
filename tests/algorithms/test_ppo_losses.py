import math

import pytest
import torch

from rlhf.algorithms.ppo import importance_weights, policy_loss, value_loss

CLIP = 0.2


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
    result = policy_loss(old + ratios.log(), old, advantages, everywhere(ratios), CLIP, weights)
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

    ppo = policy_loss(logprobs, logprobs.detach(), advantages, mask, CLIP, torch.ones_like(advantages)).loss
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
    result = policy_loss(logprobs, row(0.0), row(advantage), row(True), CLIP, row(1.0))
    result.loss.backward()
    # d/dlogp of -ratio * A is -ratio * A
    assert logprobs.grad.item() == pytest.approx(0 if blocked else -ratio * advantage)
    assert result.clip_fraction.item() == blocked


def test_policy_loss_differentiates_the_new_logprobs_only():
    tensors = [torch.randn(2, 3, requires_grad=True) for _ in range(4)]
    logprobs, old, advantages, weights = tensors
    result = policy_loss(logprobs, old, advantages, everywhere(logprobs), CLIP, weights)
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
        policy = policy_loss(a[rows], b[rows], c[rows], mask[rows], CLIP, d[rows].exp())
        return torch.stack([*policy, *value_loss(a[rows], b[rows], c[rows], mask[rows], CLIP)])

    torch.testing.assert_close(both(slice(0, 2)) + both(slice(2, 6)), both(slice(0, 6)))
