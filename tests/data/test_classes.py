"""Texts with labels: which classes there are, who is held out, and the batch that comes of it."""

import numpy as np
import pytest
import torch
from byte_tokenizer import ByteTokenizer

from rlhf.data.classes import ClassSequence, Labels, collate_classes, split_classes
from rlhf.data.content import digest
from rlhf.data.rows import TextRow
from rlhf.data.sequences import TokenSequence
from rlhf.data.splits import digest_array
from rlhf.data.tokenize import text_sequence
from rlhf.errors import DataError


def labels(*given):
    taken = Labels()
    for number, label in enumerate(given, start=1):
        taken.add(TextRow(f"text {number}", label, f"t.csv:{number}"))
    return taken


def test_classes_are_sorted_by_name_or_by_value():
    assert labels("b", "a", "b", "C").classes() == ["C", "a", "b"]
    assert labels(10, 9, -1, 9).classes() == [-1, 9, 10]
    assert labels("10", "9", "-1").classes() == ["-1", "9", "10"]  # as CSV writes numbers
    assert labels("10", "9", "nine").classes() == ["10", "9", "nine"]


def test_one_class_alone_is_refused():
    with pytest.raises(DataError) as error:
        labels("spam", "spam").classes()
    assert str(error.value) == "t.csv: all 2 rows have the label 'spam'; a classifier needs two"


def test_names_and_numbers_are_not_mixed():
    with pytest.raises(DataError) as error:
        labels(1, 0, "1")
    assert str(error.value) == ("t.csv:3: label '1' is a name, but 1 of t.csv:1 is a number; write all labels alike")


def split(given, fraction, texts=None, seed=1):
    names = list(dict.fromkeys(given))
    numbers = np.array([names.index(label) for label in given])
    digests = digest_array(digest(text) for text in texts or map(str, range(len(given))))
    train, heldout = split_classes(names, numbers, digests, fraction, seed)
    return list(train), list(heldout)


def test_every_class_is_held_out_by_its_share():
    given = ["a"] * 40 + ["b"] * 20 + ["c"] * 3
    train, heldout = split(given, 0.1)
    assert sorted(train + heldout) == list(range(63))
    assert [sum(given[row] == label for row in heldout) for label in "abc"] == [4, 2, 1]
    assert train == sorted(train)
    assert heldout == sorted(heldout)


def test_the_seed_decides_who():
    given = ["a", "b"] * 50
    assert split(given, 0.2) == split(given, 0.2)
    assert split(given, 0.2) != split(given, 0.2, seed=2)


def test_a_class_does_not_bear_on_another():
    """Rows that join one class leave what is held out of the others as it was."""
    given = ["a", "b"] * 50
    _, heldout = split(given, 0.2)
    _, more = split([*given, *["c"] * 9], 0.2)
    assert [row for row in more if row < 100] == heldout


def test_equal_texts_stay_on_one_side():
    given = ["a"] * 30 + ["b"] * 30
    texts = [str(number % 15) for number in range(60)]
    for seed in range(5):
        train, heldout = split(given, 0.2, texts, seed)
        assert len(heldout) == 12
        sides = [{(given[row], texts[row]) for row in side} for side in (train, heldout)]
        assert not sides[0] & sides[1]


def test_a_label_that_cannot_be_on_both_sides_is_named():
    with pytest.raises(ValueError, match="'b' has 1 different texts, of which 1 would be held out"):
        split(["a", "a", "b"], 0.1)
    with pytest.raises(ValueError, match="'a' has 1 different texts"):
        split(["a", "a", "b", "b"], 0.1, ["same", "same", "x", "y"])
    with pytest.raises(ValueError, match="'a' has 2 different texts, of which 2 would be held out"):
        split(["a", "a", "b", "b"], 1.0)


def test_nothing_is_held_out_where_nothing_shall_be():
    assert split(["a", "b", "b"], 0.0) == ([0, 1, 2], [])


def test_a_text_is_its_tokens_and_nothing_else():
    row = TextRow("né", "x", "t.csv:4")
    sequence = text_sequence(row, ByteTokenizer(), 3)
    assert sequence == TokenSequence((110, 0xC3, 0xA9), (False, False, False))
    with pytest.raises(DataError) as error:
        text_sequence(row, ByteTokenizer(), 2)
    assert str(error.value) == "t.csv:4: text has 3 tokens, the limit is 2 (max_length)"


def test_a_batch_selects_and_trims_with_its_labels():
    rows = [ClassSequence(TokenSequence((5, 6, 7), (False,) * 3), 2), ClassSequence(TokenSequence((8,), (False,)), 0)]
    batch = collate_classes(rows, pad_id=99)
    assert batch.batch.tokens.tolist() == [[5, 6, 7], [8, 99, 99]]
    assert batch.labels.tolist() == [2, 0]
    assert (batch.labels.dtype, len(batch)) == (torch.int64, 2)
    assert batch.families() == [[0], [1]]
    short = batch.select([1]).trim()
    assert (short.batch.tokens.tolist(), short.labels.tolist(), short.token_count()) == ([[8]], [0], 1)
