import math

import pytest
import torch

from rlhf.algorithms.advantages import (
    gae,
    group_centred,
    group_normalised,
    leave_one_out,
    to_tokens,
    token_rewards,
    whitened_to_go,
)


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


SCORES = torch.tensor([1.0, 10.0, 2.0, 10.0, 6.0, 10.0])
GROUPS = torch.tensor(
    [0, 1, 0, 1, 0, 1]
)  # group 0: 1, 2, 6 with mean 3 and variance (4 + 1 + 9) / 2 = 7; group 1: tens


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        (group_centred, [-2, 0, -1, 0, 3, 0]),
        (leave_one_out, [1 - 4, 0, 2 - 3.5, 0, 6 - 1.5, 0]),
        (group_normalised, [-2 / 7**0.5, 0, -1 / 7**0.5, 0, 3 / 7**0.5, 0]),
    ],
)
def test_group_estimators_by_hand(estimator, expected):
    assert estimator(SCORES, GROUPS).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.fixture(params=range(4))
def drawn(request):
    """Scores of 5 groups of 2 to 6 samples, in mixed order."""
    generator = torch.Generator().manual_seed(request.param)
    groups = torch.repeat_interleave(torch.arange(5), torch.tensor([2, 3, 4, 5, 6]))
    order = torch.randperm(20, generator=generator)
    return 3 * torch.randn(20, generator=generator), groups[order]


@pytest.mark.parametrize("estimator", [group_centred, group_normalised, leave_one_out])
def test_group_advantages_sum_to_0_whatever_the_order_and_the_level(drawn, estimator):
    scores, groups = drawn
    advantages = estimator(scores, groups)
    assert advantages.dtype == torch.float32
    for group in range(5):
        assert advantages[groups == group].sum().item() == pytest.approx(0, abs=1e-5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(estimator(scores[order], groups[order]), advantages[order])
    level = 10 * torch.randn(5, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(estimator(scores + level[groups], groups), advantages, rtol=1e-4, atol=1e-5)


def test_leave_one_out_is_the_centred_score_scaled_by_n_over_n_minus_1(drawn):
    scores, groups = drawn
    sizes = groups.bincount()[groups].float()
    torch.testing.assert_close(leave_one_out(scores, groups), sizes / (sizes - 1) * group_centred(scores, groups))
    for row in range(20):
        others = (groups == groups[row]) & (torch.arange(20) != row)
        assert leave_one_out(scores, groups)[row].item() == pytest.approx(
            (scores[row] - scores[others].mean()).item(), abs=1e-5
        )


def test_grpo_is_dr_grpo_over_the_groups_spread_and_so_has_spread_1(drawn):
    scores, groups = drawn
    normalised, centred = group_normalised(scores, groups), group_centred(scores, groups)
    for group in range(5):
        rows = groups == group
        torch.testing.assert_close(normalised[rows] * (scores[rows].std() + 1e-4), centred[rows])
        assert normalised[rows].std().item() == pytest.approx(1, abs=2e-3)
    torch.testing.assert_close(group_normalised(50 * scores, groups), normalised, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("estimator", [group_centred, group_normalised, leave_one_out])
@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1, 3e7])
def test_a_group_of_equal_scores_has_no_advantage(estimator, value):
    assert estimator(torch.full((7,), value), torch.zeros(7, dtype=torch.int64)).abs().max() < 1e-6
    noisy = torch.tensor([0.1, 0.1 + 1e-8, 0.1 - 1e-8])
    assert estimator(noisy, torch.zeros(3, dtype=torch.int64)).abs().max() < 1e-3


def test_to_tokens_by_hand():
    mask = bools([0, 1, 1], [0, 0, 1])
    assert to_tokens(torch.tensor([2.0, -1.0]), mask).tolist() == [[0, 2, 2], [0, 0, -1]]


def test_whitened_to_go_by_hand():
    # gamma 0.5: 1 + 0.5 * 4 = 3 and 4; the other row -1. Mean 2, deviations 1, 2, -3, variance 14/3.
    rewards = torch.tensor([[7.0, 1.0, 4.0], [7.0, 7.0, -1.0]])
    advantages = whitened_to_go(rewards, bools([0, 1, 1], [0, 0, 1]), 0.5)
    std = math.sqrt(14 / 3)
    torch.testing.assert_close(advantages, torch.tensor([[0, 1 / std, 2 / std], [0, 0, -3 / std]]))


def test_undiscounted_rewards_to_go_of_a_score_alone_are_its_whitened_broadcast():
    mask = bools([0, 1, 1, 1], [0, 0, 1, 0])
    rewards = token_rewards(torch.tensor([3.0, -1.0]), torch.zeros(2, 4), mask, 0.0)
    advantages = whitened_to_go(rewards, mask, 1.0)
    assert advantages[0, 1:].unique().numel() == 1
    assert advantages[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert advantages[mask].square().mean().item() == pytest.approx(1)
