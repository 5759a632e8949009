"""Cutting batches: every row once, within the budget, shared padding dropped."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from engine_cases import experience, preference_batch, random_tokens, token_batch
from torch import Tensor

from rlhf.engines.microbatch import micro_batches, rank_passes
from rlhf.types import Rows, TokenBatch


def sequences(lengths: list[int]) -> TokenBatch:
    """Random sequences of the given lengths, the last token of each the response; no two share a prompt."""
    return random_tokens(1, lengths, [max(0, length - 1) for length in lengths])


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (20, [[1, 3], [2, 0, 4]]),
        (12, [[1], [3], [2, 0, 4]]),
        (5, [[1], [3], [2], [0], [4]]),
        (50, [[1, 3, 2, 0, 4]]),
    ],
)
def test_longest_rows_stand_together(max_tokens: int, expected: list[list[int]]) -> None:
    assert rank_passes(sequences([3, 10, 4, 9, 3]), max_tokens, flat=False) == [expected]


def test_padding_costs_nothing_where_rows_are_laid_flat() -> None:
    batch = sequences([3, 10, 4, 9, 3])
    assert rank_passes(batch, 17, flat=True) == [[[1], [3, 2, 0], [4]]]
    assert rank_passes(batch, 17, flat=False) == [[[1], [3], [2, 0, 4]]]


def test_rows_with_one_prompt_stay_together_and_pay_for_it_once() -> None:
    batch = random_tokens(1, [12, 30, 14, 11], [10, 10, 10, 10])
    batch.tokens[[0, 2, 3], :10] = batch.tokens[0, :10].clone()
    assert batch.families() == [[0, 2, 3], [1]]
    assert rank_passes(batch, 30, flat=True) == [[[1], [2, 0, 3]]]
    assert rank_passes(batch, 47, flat=True) == [[[1, 2, 0, 3]]]
    assert rank_passes(batch, 15, flat=True) == [[[1], [2], [0, 3]]]
    assert rank_passes(batch, 30, flat=True, ranks=2) == [[[1]], [[2, 0, 3]]]


@pytest.mark.parametrize("seed", range(20))
def test_every_row_once_and_within_the_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 100, (int(torch.randint(1, 60, (1,), generator=generator)),), generator=generator)
    budget = int(torch.randint(1, 600, (1,), generator=generator))
    (groups,) = rank_passes(sequences(lengths.tolist()), budget, flat=False)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[group]) <= budget
    for group, following in pairwise(groups):
        assert min(lengths[group]) >= max(lengths[following])
        assert (len(group) + 1) * max(lengths[group]) > budget


def test_equal_lengths_keep_their_order() -> None:
    assert rank_passes(sequences([5, 5, 5, 5]), 10, flat=False) == [[[0, 1], [2, 3]]]


@pytest.mark.parametrize("make", [token_batch, experience, preference_batch])
def test_passes_are_the_chosen_rows_without_shared_padding(make: Callable[[], Rows]) -> None:
    batch = make()
    seen = []
    for rows, part in micro_batches(batch, 30, flat=False):
        seen += rows
        assert len(part) == len(rows)
        assert torch.equal(part.lengths(), batch.lengths()[rows])
        for cut, whole in tensors(part, batch):
            kept = whole[rows][:, : cut.shape[1]] if cut.ndim == 2 else whole[rows]
            assert torch.equal(cut, kept)
            assert not whole[rows][:, cut.shape[1] :].any() if cut.ndim == 2 else True
    assert sorted(seen) == list(range(len(batch)))


def tensors(part: Rows, whole: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of both batches, nested ones too."""
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            yield value, getattr(whole, name)
        else:
            yield from tensors(value, getattr(whole, name))


def test_width_is_that_of_the_longest_row_of_the_pass() -> None:
    batch = random_tokens(1, [4, 12, 6, 5], [1, 1, 1, 1])
    assert [(rows, part.width) for rows, part in micro_batches(batch, 12, flat=False)] == [
        ([1], 12),
        ([2, 3], 6),
        ([0], 4),
    ]


def test_a_pair_costs_its_longer_side_twice() -> None:
    batch = preference_batch()
    assert batch.lengths().tolist() == [24, 28, 12, 22, 18]
    assert batch.flat_lengths().tolist() == [9 + 12 - 4, 14 + 8 - 6, 5 + 6 - 3, 11 + 5 - 2, 7 + 9 - 6]
    widths = [(part.chosen.width, part.rejected.width) for _, part in micro_batches(batch, 28, flat=False)]
    assert widths == [(14, 8), (9, 12), (11, 5), (7, 9), (5, 6)]
