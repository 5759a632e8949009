"""Padding, written out."""

import torch

from rlhf.data.collate import collate, collate_pairs, collate_rollouts
from rlhf.data.sequences import TokenPair, TokenSequence
from rlhf.types import Prompt, Rollout

LONG = TokenSequence((5, 6, 7), (False, True, True))
SHORT = TokenSequence((8,), (False,))


def test_sequences_are_padded_on_the_right():
    batch = collate([SHORT, LONG], pad_id=99)
    assert batch.tokens.tolist() == [[8, 99, 99], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.response_mask.tolist() == [[False, False, False], [False, True, True]]
    assert batch.rollout_logprobs.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert (batch.tokens.dtype, batch.attention_mask.dtype, batch.response_mask.dtype) == (
        torch.int64, torch.bool, torch.bool,
    )  # fmt: skip
    assert batch.rollout_logprobs.dtype == torch.float32
    assert batch.lengths().tolist() == [1, 3]


def test_a_pad_id_inside_a_sequence_is_a_real_token():
    batch = collate([TokenSequence((4, 99), (False, True)), LONG], pad_id=99)
    assert batch.attention_mask[0].tolist() == [True, True, False]
    assert batch.response_mask[0].tolist() == [False, True, False]


def test_rollout_logprobs_stand_on_their_response_tokens():
    def rollout(prompt, tokens, logprobs):
        return Rollout(Prompt("1", prompt, "p"), tokens, logprobs, "r", "stop", 0, 0)

    batch = collate_rollouts([rollout((1, 2), (3,), (-0.5,)), rollout((1,), (4, 5, 2), (-1.0, -2.0, -0.25))], pad_id=0)
    assert batch.tokens.tolist() == [[1, 2, 3, 0], [1, 4, 5, 2]]
    assert batch.response_mask.tolist() == [[False, False, True, False], [False, True, True, True]]
    assert batch.attention_mask.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.rollout_logprobs.tolist() == [[0, 0, -0.5, 0], [0, -1, -2, -0.25]]


def test_the_sides_of_pairs_are_padded_each_to_its_own_width():
    pairs = [TokenPair(LONG, SHORT, 0.5), TokenPair(SHORT, SHORT, 0.0)]
    batch = collate_pairs(pairs, pad_id=0)
    assert batch.chosen.tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.rejected.tokens.tolist() == [[8], [8]]
    assert batch.margins.tolist() == [0.5, 0.0]
    assert batch.chosen_ref_logprobs.tolist() == batch.rejected_ref_logprobs.tolist() == [0.0, 0.0]
    assert len(batch) == 2
