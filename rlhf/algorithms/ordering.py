"""How often one number of a pair is the larger one, where both may be equal."""

from __future__ import annotations

from torch import Tensor


def wins(first: Tensor, second: Tensor) -> Tensor:
    """Return 1 where `first` is larger, 0 where `second` is, and one half for a tie; float32, of the same shape.

    The mean is the probability of superiority (Vargha & Delaney 2000): one half for numbers that say nothing, as a
    policy that still equals its reference, or scores that are all the same.
    """
    return ((first > second).float() + (first >= second).float()) / 2
