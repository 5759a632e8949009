"""KTO's mismatched pairs and the reference point that follows from them, by hand."""

from dataclasses import dataclass

import pytest
import torch

from rlhf.data.sequences import LabelledSequence, answered
from rlhf.errors import DataError
from rlhf.roles import Ready
from rlhf.stages.kto import Example, labelled_batch, mismatches, pair_accuracy
from rlhf.types import TokenBatch, TokenScores


def labelled(prompt, response, desirable=True):
    return LabelledSequence(answered(tuple(prompt), tuple(response)), desirable)


ROWS = [labelled([1, 2], [10]), labelled([3], [11, 12]), labelled([4, 5, 6], [13])]
PROMPTS = [(1, 2), (3,), (4, 5, 6)]


def test_each_response_follows_the_next_prompt_in_a_circle():
    found = mismatches(ROWS, PROMPTS, 100)
    assert [row.tokens for row in found] == [(3, 10), (4, 5, 6, 11, 12), (1, 2, 13)]
    assert [sum(row.response_mask) for row in found] == [1, 2, 1]
    assert all(row.response_mask[-1] and not row.response_mask[0] for row in found)


def test_both_sides_of_a_pair_get_the_prompt_of_another():
    rows = [labelled([1], [10]), labelled([1], [11], False), labelled([2], [12]), labelled([2], [13], False)]
    found = mismatches(rows, [(1,), (1,), (2,), (2,)], 100)
    assert [row.tokens for row in found] == [(2, 10), (2, 11), (1, 12), (1, 13)]


def test_held_out_rows_take_the_prompts_of_the_others():
    rows = [labelled([9], [20]), labelled([3], [21])]
    assert [row.tokens for row in mismatches(rows, PROMPTS[:2], 100)] == [(3, 20), (1, 2, 21)]
    assert list(mismatches([], PROMPTS, 100)) == []


def test_a_long_prompt_loses_its_beginning_and_never_the_response():
    rows = [labelled([1], [10, 11, 12]), labelled([2, 3, 4, 5], [13])]
    prompts = [(1,), (2, 3, 4, 5)]
    assert [row.tokens for row in mismatches(rows, prompts, 3)] == [(4, 5, 10, 11, 12), (1, 13)]
    assert [row.tokens for row in mismatches(rows, prompts, 6)] == [(3, 4, 5, 10, 11, 12), (1, 13)]


def test_one_prompt_for_all_is_an_error():
    with pytest.raises(DataError, match="all rows have the same prompt"):
        mismatches([labelled([1], [10]), labelled([1], [11])], [(1,), (1,)], 100)


@dataclass(frozen=True)
class Constant:
    """A model that gives every token the same log-probability."""

    logprob: float

    def logprobs(self, batch: TokenBatch) -> Ready[TokenScores]:
        shape = batch.tokens.shape
        return Ready(TokenScores(torch.full(shape, self.logprob), torch.zeros(shape)))


def examples(mismatched_ref_logprobs):
    others = mismatches(ROWS, PROMPTS, 100)
    return [Example(*row) for row in zip(ROWS, others, (-1.0, -2.0, -3.0), mismatched_ref_logprobs, strict=True)]


def test_the_reference_point_is_the_mean_gap_of_the_mismatches_over_the_whole_batch():
    # responses of 1, 2 and 1 tokens: -0.5, -1 and -0.5 against -2, -3 and 0
    batch = labelled_batch(Constant(-0.5), examples((-2.0, -3.0, 0.0)), pad_id=0)
    assert batch.kl.tolist() == [1.0, 1.0, 1.0]
    assert batch.ref_logprobs.tolist() == [-1.0, -2.0, -3.0]
    assert batch.select([2]).kl.tolist() == [1.0]


def test_the_reference_point_is_never_below_0():
    batch = labelled_batch(Constant(-0.5), examples((0.0, 0.0, 0.0)), pad_id=0)
    assert batch.kl.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ref_logprobs", "accuracy"),
    [((-0.5, -0.5, -0.5, -0.5), 0.5), ((-1.0, -0.5, -0.5, -0.5), 0.75), ((-0.5, -1.0, -0.5, -0.5), 0.25)],
)
def test_of_two_answers_with_equal_ratios_each_is_half_the_better(ref_logprobs, accuracy):
    row = ROWS[0]
    tokens = sum(row.sequence.response_mask)
    rows = [Example(row, row.sequence, tokens * logprob, 0.0) for logprob in ref_logprobs]
    assert pair_accuracy(Constant(-0.5), rows, pad_id=0) == accuracy
