"""Fitting the scalar head to what it should say, in closed form: a critic from its first update on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from rlhf.algorithms.ridge import RidgeFit, fit_ridge, intercept, second_moments
from rlhf.engines.scoring import scored_tokens, value_states
from rlhf.engines.shares import Part, filled
from rlhf.types import TokenBatch, ValueBatch

FOLDS = 5
Run = Callable[[Callable[[nn.Module, TokenBatch], Tensor], TokenBatch], Tensor]
"""Applies a function to the model, with its weights in place, and to a batch."""


class Head(NamedTuple):
    """weights `[1, H]`, as they are after rounding to the head's dtype, and what is subtracted from their product."""

    weights: Tensor
    offset: float


class HeadFit:
    """Ridge regression of the returns on the states that values are read from.

    All ranks pass the same whole batch, and each its own passes over it; all get the same fit. The rows of a prompt
    are in the same one of `FOLDS` folds, so that a fit that leaves a fold out has seen none of its prompts.
    """

    def __init__(self, run: Run, batch: ValueBatch, passes: Sequence[Sequence[int]], ranks: int) -> None:
        self.run = run
        self.batch = batch
        self.passes = passes
        self.folds = fold_numbers(batch)
        self.moments = self._moments(ranks)
        self.fit: RidgeFit = fit_ridge(self.moments)

    def head(self, dtype: torch.dtype) -> Head:
        """Return the head fitted to all rows, with the offset for which its mean error is 0 in that dtype."""
        rounded = self.fit.weights.to(dtype)
        offset = -float(intercept(self.moments.sum(dim=0), rounded.double()))
        return Head(rounded[None], offset)

    def values(self) -> Part:
        """Return the value before each response token of this rank's rows, `[rows, T]`, each by the fit without it."""
        parts, left_out = [], self.fit.left_out
        for rows, part, states in self._sweep():
            solved = left_out[self._fold_of_tokens(rows, part)]
            found = (states.double() * solved[:, :-1]).sum(dim=1) + solved[:, -1]
            values = torch.zeros(part.tokens.shape).masked_scatter(scored_tokens(part).cpu(), found.float().cpu())
            parts.append(pad(values, (0, self.batch.batch.width - part.width)))
        order = [row for rows in self.passes for row in rows]
        return Part(order, torch.cat(parts) if parts else torch.zeros(0, self.batch.batch.width))

    def _moments(self, ranks: int) -> Tensor:
        """Return the second moments of each fold over all ranks."""
        moments: Tensor | None = None
        for rows, part, states in self._sweep(whole=True):
            if moments is None:
                width, device = states.shape[1] + 2, states.device
                moments = torch.zeros(int(self.folds.max()) + 1, width, width, dtype=torch.float64, device=device)
            if not rows:
                continue
            returns = self.batch.returns[rows, : part.width][scored_tokens(part)]
            folds = self._fold_of_tokens(rows, part)
            for fold in folds.unique().tolist():
                moments[fold] += second_moments(states[folds == fold], returns[folds == fold])
        assert moments is not None
        if ranks > 1:
            dist.all_reduce(moments)
        return moments

    def _sweep(self, whole: bool = False) -> Iterator[tuple[Sequence[int], TokenBatch, Tensor]]:
        """Yield (rows, those rows, the states of their response tokens) of each pass; empty passes where `whole`."""
        for rows, part in filled(self.batch.batch, self.passes):
            states = self.run(value_states, part)
            if rows or whole:
                yield rows, part, states

    def _fold_of_tokens(self, rows: Sequence[int], part: TokenBatch) -> Tensor:
        return self.folds[list(rows)].to(part.tokens.device).repeat_interleave(scored_tokens(part).sum(dim=1))


def fold_numbers(batch: ValueBatch) -> Tensor:
    """Return the fold of each row, from 0, `[B]`: prompts take turns."""
    folds = torch.zeros(len(batch), dtype=torch.long)
    for number, rows in enumerate(batch.families()):
        folds[rows] = number % FOLDS
    return folds
