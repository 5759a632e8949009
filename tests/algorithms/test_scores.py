import pytest
import torch

from rlhf.algorithms.scores import flat_groups, overlong_penalty, whiten_scores


def test_whiten_scores_by_hand():
    # mean 3, deviations -2, -1, 3, variance 14/3
    expected = torch.tensor([-2.0, -1.0, 3.0]) / (14 / 3) ** 0.5
    torch.testing.assert_close(whiten_scores(torch.tensor([1.0, 2.0, 6.0])), expected)
    assert whiten_scores(torch.full((4,), 0.1)).tolist() == [0, 0, 0, 0]


def test_overlong_penalty_by_hand():
    """DAPO's own numbers, a thousandth of them: up to 16 tokens none, 20 all, of which the last 4 are the buffer."""
    lengths = torch.tensor([1, 16, 17, 18, 20])
    assert overlong_penalty(lengths, max_tokens=20, buffer=4).tolist() == [0, 0, 0.25, 0.5, 1]
    assert overlong_penalty(lengths, max_tokens=20, buffer=20).tolist() == pytest.approx([0.05, 0.8, 0.85, 0.9, 1])


def test_flat_groups_by_hand():
    scores = torch.tensor([1.0, 0.5, 1.0, 0.5, 1.0, 0.25, -3.0])
    assert flat_groups(scores, torch.tensor([0, 1, 0, 1, 0, 1, 2])).tolist() == [True, False, True]
    assert flat_groups(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []
