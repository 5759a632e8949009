import torch

from rlhf.algorithms.ordering import wins


def test_wins_by_hand():
    first, second = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.5, -1.0, 0.5, -0.0])
    assert wins(first, second).tolist() == [1, 0, 0.5, 0.5]
    assert wins(second, first).tolist() == [0, 1, 0.5, 0.5]


def test_wins_see_the_smallest_difference_in_any_dtype():
    one = torch.tensor([1.0])
    above = torch.nextafter(one, one + 1)
    assert wins(above, one).tolist() == [1]
    assert wins(one.bfloat16(), above.bfloat16()).tolist() == [0.5]
    assert wins(one.bfloat16(), one.bfloat16()).dtype == torch.float32
