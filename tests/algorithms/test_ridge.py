"""Ridge regression from second moments, against numpy's least squares and by hand."""

import math

import numpy as np
import pytest
import torch

from rlhf.algorithms.ridge import _strongest, fit_ridge, intercept, ridge, second_moments, squared_error
from rlhf.errors import TrainingError


def made(rows=60, width=4, noise=0.1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, width, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    targets = states @ torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64) + 3
    return states, targets + noise * torch.randn(rows, generator=generator, dtype=torch.float64)


def test_by_hand():
    """x 0, 2 and y 1, 5: mean 1 and 3, variance 1, covariance 2. Strength 1 halves the slope 2; b = 3 - 1 * 1."""
    moments = second_moments(torch.tensor([[0.0], [2.0]]), torch.tensor([1.0, 5.0]))
    assert moments.tolist() == [[4, 2, 10], [2, 2, 6], [10, 6, 26]]
    assert ridge(moments, 0.0).tolist() == pytest.approx([2, 1])
    assert ridge(moments, 1.0).tolist() == pytest.approx([1, 2])
    assert ridge(moments, math.inf).tolist() == [0, 3]
    assert float(squared_error(moments, ridge(moments, 1.0))) == pytest.approx(2)
    assert float(intercept(moments, torch.tensor([1.5], dtype=torch.float64))) == 1.5


@pytest.mark.parametrize("strength", [0.0, 0.3])
def test_as_numpy_s_least_squares(strength):
    """The penalty is rows of their own that ask each centred weight to be 0."""
    states, targets = made()
    centred, mean = states.numpy() - states.numpy().mean(axis=0), states.numpy().mean(axis=0)
    variance = (centred**2).mean()
    rows = np.sqrt(strength * variance * len(states)) * np.eye(4)
    wanted, *_ = np.linalg.lstsq(
        np.vstack([centred, rows]), np.concatenate([targets.numpy() - targets.numpy().mean(), np.zeros(4)]), rcond=None
    )
    found = ridge(second_moments(states, targets), strength)
    np.testing.assert_allclose(found[:-1].numpy(), wanted, rtol=1e-9, atol=1e-12)
    assert float(found[-1]) == pytest.approx(targets.numpy().mean() - wanted @ mean)


def test_moments_of_parts_add_up_in_any_order():
    states, targets = made()
    parts = [second_moments(states[rows], targets[rows]) for rows in (slice(40, 60), slice(0, 40))]
    torch.testing.assert_close(sum(parts), second_moments(states, targets))


def folds(states, targets, count=5):
    return torch.stack([second_moments(states[fold::count], targets[fold::count]) for fold in range(count)])


def test_a_fit_that_leaves_a_fold_out_is_the_fit_to_the_others():
    states, targets = made()
    fit = fit_ridge(folds(states, targets))
    others = torch.arange(60) % 5 != 2
    torch.testing.assert_close(fit.left_out[2], ridge(second_moments(states[others], targets[others]), fit.strength))
    torch.testing.assert_close(
        torch.cat([fit.weights, fit.intercept[None]]), ridge(second_moments(states, targets), fit.strength)
    )


def test_where_something_is_known_it_is_learnt_and_where_nothing_is_the_mean_stays():
    """More inputs than rows fit any noise exactly; what they say of other rows is what counts."""
    generator = torch.Generator().manual_seed(3)
    states, noise = torch.randn(40, 80, generator=generator), torch.randn(40, generator=generator)
    assert fit_ridge(folds(*made())).strength < 0.1
    unknown = fit_ridge(folds(states, noise))
    assert unknown.strength >= 10
    assert float((states.double() @ unknown.weights).std()) < 0.5 * float(noise.std())


def test_the_strongest_penalty_within_a_standard_error_of_the_best_is_taken():
    """Differences to the best, 10 in all: 1, 1, 1 has no error; 3, -1, -1 sums to 1, and its error is 2.31 * 1.73."""
    best, sure, unsure = [3.0, 3.0, 4.0], [4.0, 4.0, 5.0], [6.0, 2.0, 3.0]
    assert _strongest(torch.tensor([best, sure])) == 0
    assert _strongest(torch.tensor([best, unsure, sure])) == 1


def test_one_fold_with_rows_gives_its_mean():
    states, targets = made()
    moments = torch.zeros(3, 6, 6, dtype=torch.float64)
    moments[1] = second_moments(states, targets)
    fit = fit_ridge(moments)
    assert not fit.weights.any()
    assert fit.left_out[:, -1].tolist() == pytest.approx([float(targets.mean())] * 3)


def test_equal_states_give_the_mean():
    fit = fit_ridge(folds(torch.ones(10, 3), torch.arange(10.0)))
    assert not fit.weights.any()
    assert float(fit.intercept) == pytest.approx(4.5)


def test_what_is_not_finite_is_refused():
    states, targets = made()
    targets[3] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        fit_ridge(folds(states, targets))
