"""Ridge regression in closed form, from second moments alone, with the strength chosen on folds left out."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.errors import TrainingError

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, math.inf)
"""Penalties on the squared weights, in units of the mean variance of an input; the last leaves the mean alone."""


class RidgeFit(NamedTuple):
    """weights `[H]` and intercept of all folds together; left_out `[F, H + 1]`: of all but one, intercept last."""

    weights: Tensor
    intercept: Tensor
    left_out: Tensor
    strength: float


def second_moments(states: Tensor, targets: Tensor) -> Tensor:
    """Return Z'Z of the rows Z = (state, 1, target), float64 `[H + 2, H + 2]`, from `[S, H]` and `[S]`.

    Moments of parts of the rows add up to those of all.
    """
    rows = torch.cat([states.double(), states.new_ones(len(states), 1).double(), targets.double()[:, None]], dim=1)
    return rows.T @ rows


def fit_ridge(moments: Tensor) -> RidgeFit:
    """Return the fit to all folds of moments `[F, H + 2, H + 2]`, and those that leave one fold out each.

    The strength is the largest of `STRENGTHS` whose fits predict the folds left out about as well as any. A single fold
    with rows has nothing to be predicted by, so its mean is all that is taken. Raises TrainingError for moments that
    are not finite.
    """
    if not moments.isfinite().all():
        raise TrainingError("states or targets of the regression are not finite")
    whole = moments.sum(dim=0)
    if int((moments[:, -2, -2] > 0).sum()) < 2:
        solved = ridge(whole, math.inf)
        return RidgeFit(solved[:-1], solved[-1], solved.expand(len(moments), -1), math.inf)
    fits = [torch.stack([ridge(whole - fold, strength) for fold in moments]) for strength in STRENGTHS]
    errors = torch.stack([_errors(moments, left_out) for left_out in fits])
    chosen = _strongest(errors)
    solved = ridge(whole, STRENGTHS[chosen])
    return RidgeFit(solved[:-1], solved[-1], fits[chosen], STRENGTHS[chosen])


def _errors(moments: Tensor, left_out: Tensor) -> Tensor:
    """Return the squared error of each fold by the fit without it, `[F]`."""
    return torch.stack([squared_error(fold, solved) for fold, solved in zip(moments, left_out, strict=True)])


def _strongest(errors: Tensor) -> int:
    """Return the number of the last strength no worse than the best, by errors `[strengths, F]` (Breiman et al. 1984).

    No worse is what is worse by at most one standard error of the sum of the folds' differences.
    """
    worse = errors - errors[errors.sum(dim=1).argmin()]
    fits = worse.sum(dim=1) <= worse.std(dim=1) * math.sqrt(worse.shape[1])
    return int(fits.nonzero().max())


def ridge(moments: Tensor, strength: float) -> Tensor:
    """Return the H weights w and the intercept b, `[H + 1]`, from moments `[H + 2, H + 2]`.

    They minimise the mean of (w'x + b - y)^2 plus `strength` * v * |w|^2, v being the mean variance of an input; b is
    not penalised (Hoerl and Kennard 1970).
    """
    mean = moments[-2] / moments[-2, -2]
    centred = moments / moments[-2, -2] - mean.outer(mean)
    gram, cross = centred[:-2, :-2], centred[:-2, -1]
    variance = gram.diagonal().mean()
    weights = torch.zeros_like(cross)
    if math.isfinite(strength) and variance > 0:
        penalised = gram + strength * variance * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.cholesky_solve(cross[:, None], torch.linalg.cholesky(penalised))[:, 0]
    return torch.cat([weights, intercept(moments, weights)[None]])


def intercept(moments: Tensor, weights: Tensor) -> Tensor:
    """Return the b for which the mean error of w'x + b is 0, a scalar, for weights w `[H]`."""
    mean = moments[-2] / moments[-2, -2]
    return mean[-1] - mean[:-2] @ weights


def squared_error(moments: Tensor, solved: Tensor) -> Tensor:
    """Return the sum of (w'x + b - y)^2 over the rows that the moments are of, a scalar."""
    signed = torch.cat([solved, -solved.new_ones(1)])
    return signed @ moments @ signed
