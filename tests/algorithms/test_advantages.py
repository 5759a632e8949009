import pytest
import torch

from rlhf.algorithms.advantages import gae, token_rewards


def bools(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_token_rewards_by_hand():
    mask = bools([0, 0, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0])
    kl = torch.tensor([[9.0, 9.0, 1.0, -2.0, 9.0], [9.0, 4.0, 9.0, 9.0, 9.0], [9.0] * 5])
    rewards = token_rewards(torch.tensor([3.0, -1.0, 7.0]), kl, mask, 0.5)
    assert rewards.tolist() == [[0, 0, -0.5, 4.0, 0], [0, -3.0, 0, 0, 0], [0] * 5]


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5; values 1, 2; rewards 0, 4
    # delta_2 = 4 - 2 = 2; delta_1 = 0 + 0.5 * 2 - 1 = 0; A_2 = 2; A_1 = 0 + 0.25 * 2 = 0.5
    mask = bools([0, 1, 1, 0])
    rewards = torch.tensor([[7.0, 0.0, 4.0, 7.0]])
    values = torch.tensor([[7.0, 1.0, 2.0, 7.0]])
    advantages, returns = gae(rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[0, 0.5, 2, 0]]
    assert returns.tolist() == [[0, 1.5, 4, 0]]


def by_definition(rewards, values, gamma, gae_lambda):
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, over one response without padding."""
    steps = len(rewards)
    value = [*values, 0.0]
    delta = [rewards[t] + gamma * value[t + 1] - value[t] for t in range(steps)]
    return [sum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, steps)) for t in range(steps)]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_gae_equals_its_definition_on_ragged_responses(seed, gamma, gae_lambda):
    generator = torch.Generator().manual_seed(seed)
    rows, width = 9, 14
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    start = torch.randint(1, width, (rows,), generator=generator)
    length = torch.randint(0, width, (rows,), generator=generator)
    positions = torch.arange(width)
    mask = (positions >= start[:, None]) & (positions < (start + length)[:, None])

    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)

    assert advantages[~mask].count_nonzero() == 0
    assert returns[~mask].count_nonzero() == 0
    for row in range(rows):
        real = mask[row]
        expected = by_definition(rewards[row, real].tolist(), values[row, real].tolist(), gamma, gae_lambda)
        assert advantages[row, real].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, real].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[row, real].tolist(), strict=True)]
        )


def test_a_gap_in_the_response_takes_no_time():
    rewards = torch.tensor([[1.0, 50.0, 2.0]])
    values = torch.tensor([[0.5, 60.0, 0.25]])
    with_gap, _ = gae(rewards, values, bools([1, 0, 1]), 0.9, 0.8)
    without, _ = gae(rewards[:, ::2], values[:, ::2], bools([1, 1]), 0.9, 0.8)
    assert torch.equal(with_gap[:, ::2], without)
    assert with_gap[0, 1] == 0


def test_undiscounted_returns_with_lambda_1_are_rewards_to_go():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    values = torch.tensor([[0.0, 3.0, -1.0, 8.0]])
    _, returns = gae(rewards, values, bools([0, 1, 1, 1]), 1.0, 1.0)
    assert returns.tolist() == [[0, 7, 6, 4]]


def test_advantages_and_returns_are_constants():
    values = torch.ones(1, 2, requires_grad=True)
    advantages, returns = gae(torch.ones(1, 2), values, bools([1, 1]), 1.0, 0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
