import pytest
import torch

from rlhf.algorithms.masked import last_index, masked_mean, masked_sum, whiten

NAN = float("nan")
VALUES = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, float("inf")]])
MASK = torch.tensor([[True, True, False], [True, False, False]])


def test_sum_and_mean_by_hand():
    assert masked_sum(VALUES, MASK).item() == 7
    assert masked_mean(VALUES, MASK).item() == pytest.approx(7 / 3)


def test_nothing_to_reduce_is_zero():
    nothing = torch.zeros_like(MASK)
    assert masked_sum(VALUES, nothing).item() == 0
    assert masked_mean(VALUES, nothing).item() == 0
    assert whiten(VALUES, nothing).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_nan_off_the_mask_reaches_no_gradient():
    values = VALUES.clone().requires_grad_()
    masked_mean(values, MASK).backward()
    third = 1 / 3
    torch.testing.assert_close(values.grad, torch.tensor([[third, third, 0], [third, 0, 0]]))


def test_whiten_by_hand():
    # mean 7/3; deviations -4/3, -1/3, 5/3; variance (16 + 1 + 25) / 27 = 14/9
    std = (14 / 9) ** 0.5
    expected = torch.tensor([[-4 / 3, -1 / 3, 0], [5 / 3, 0, 0]]) / std
    torch.testing.assert_close(whiten(VALUES, MASK), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (-30, 1e-2), (500, 3)])
def test_whiten_has_mean_0_and_variance_1_over_the_mask(seed, shift, scale):
    generator = torch.Generator().manual_seed(seed)
    values = shift + scale * torch.randn(7, 11, generator=generator)
    mask = torch.rand(7, 11, generator=generator) < 0.4
    white = whiten(values, mask)
    assert white.dtype == torch.float32
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].var(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert white[~mask].count_nonzero() == 0
    assert torch.equal(white[mask].argsort(), values[mask].argsort())


@pytest.mark.parametrize("value", [0.0, 0.1, -1000.1, 3e7])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_whiten_of_equal_values_is_zero(value, count):
    values = torch.full((1, 100), value)
    mask = torch.arange(100)[None] < count
    values[~mask] = 5.0
    assert whiten(values, mask).count_nonzero() == 0


def test_whiten_does_not_blow_up_rounding_noise():
    noisy = torch.tensor([[0.1, 0.1 + 1e-8, 0.1 - 1e-8]])
    assert noisy[0].unique().numel() > 1
    assert whiten(noisy, torch.ones(1, 3, dtype=torch.bool)).count_nonzero() == 0


def test_last_index():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    assert last_index(mask).tolist() == [2, 0, 3, -1]
