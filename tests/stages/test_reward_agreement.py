"""How far two orders of the same pairs agree, where either may leave a pair open."""

import pytest
import torch

from rlhf.algorithms.ordering import wins
from rlhf.stages.reward import agreement

TRUTH = torch.tensor([1.0, 1.0, 0.0, 0.0])


def test_agreement_by_hand() -> None:
    assert agreement(TRUTH, TRUTH) == 1
    assert agreement(1 - TRUTH, TRUTH) == 0
    assert agreement(torch.tensor([1.0, 0.0, 0.0, 1.0]), TRUTH) == 0.5


def test_a_model_that_scores_all_alike_agrees_with_half_of_any_order() -> None:
    alike = wins(torch.zeros(4), torch.zeros(4))
    for truth in (TRUTH, torch.ones(4), torch.zeros(4)):
        assert agreement(alike, truth) == 0.5


def test_a_tie_on_either_side_counts_half() -> None:
    ours = torch.tensor([1.0, 0.5, 0.0, 1.0])
    assert agreement(ours, TRUTH) == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    assert agreement(TRUTH, ours) == pytest.approx((1 + 0.5 + 1 + 0) / 4)
