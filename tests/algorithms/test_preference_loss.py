import math

import pytest
import torch

from rlhf.algorithms.preference import dpo_loss, implicit_rewards
from rlhf.algorithms.reward_model import bradley_terry_loss

# logratios: chosen 2 and -1, rejected -2 and 1, so with beta 0.5 the margins are 2 and -1
CHOSEN, REF_CHOSEN = torch.tensor([-10.0, -7.0]), torch.tensor([-12.0, -6.0])
REJECTED, REF_REJECTED = torch.tensor([-20.0, -5.0]), torch.tensor([-18.0, -6.0])


def softplus(x):
    return math.log1p(math.exp(x))


def test_implicit_rewards_by_hand():
    assert implicit_rewards(CHOSEN, REF_CHOSEN, 0.5).tolist() == [1.0, -0.5]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo_loss_by_hand(smoothing):
    losses = dpo_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, 0.5, smoothing)
    expected = [(1 - smoothing) * softplus(-margin) + smoothing * softplus(margin) for margin in (2, -1)]
    torch.testing.assert_close(losses, torch.tensor(expected))


def test_dpo_starts_at_log_2_with_gradient_half_beta():
    chosen, rejected = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    losses = dpo_loss(chosen, rejected, CHOSEN, REJECTED, 0.1, 0.0)
    torch.testing.assert_close(losses.detach(), torch.full((2,), math.log(2)))
    losses.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.full((2,), -0.05))
    torch.testing.assert_close(rejected.grad, torch.full((2,), 0.05))


def test_smoothed_loss_is_least_where_the_policy_is_as_sure_as_the_labels():
    # cDPO: sigmoid(margin) = 1 - smoothing at the minimum
    chosen = torch.tensor([math.log(9)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    dpo_loss(chosen, zero, zero, zero, 1.0, 0.1).sum().backward()
    assert chosen.grad.item() == pytest.approx(0, abs=1e-12)


def test_losses_of_hopeless_pairs_stay_finite():
    far = torch.tensor([-1e5])
    zero = torch.zeros(1)
    assert dpo_loss(far, zero, zero, zero, 0.1, 0.0).item() == pytest.approx(1e4)
    assert dpo_loss(zero, far, zero, zero, 0.1, 0.0).item() == 0
    assert bradley_terry_loss(far, zero, zero).item() == pytest.approx(1e5)


def test_bradley_terry_by_hand():
    losses = bradley_terry_loss(
        torch.tensor([1.0, 1.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 3.0])
    )
    torch.testing.assert_close(losses, torch.tensor([softplus(-2), math.log(2), softplus(3)]))
