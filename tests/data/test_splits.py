"""Splits by digests are the ones that lists of rows in dictionaries would give."""

import random

import numpy as np
import pytest

from rlhf.data.classes import split_classes
from rlhf.data.content import digest
from rlhf.data.splits import by_count, by_group, digest_array, group_numbers

TEXTS = [list(map(str, random.Random(most).choices(range(most), k=200))) for most in (3, 40, 10**6)]


def groups_of(texts):
    groups = {}
    for row, text in enumerate(texts):
        groups.setdefault(text, []).append(row)
    return list(groups.values())


@pytest.mark.parametrize("texts", TEXTS)
def test_groups_are_numbered_as_they_begin(texts):
    first = list(dict.fromkeys(texts))
    assert group_numbers(digest_array(map(digest, texts))).tolist() == [first.index(text) for text in texts]


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_a_share_of_the_groups(texts, fraction):
    groups = groups_of(texts)
    random.Random(7).shuffle(groups)
    cut = round(len(groups) * fraction)
    heldout, train = ([row for group in part for row in group] for part in (groups[:cut], groups[cut:]))
    found = by_group(digest_array(map(digest, texts)), fraction, random.Random(7))
    assert [list(side) for side in found] == [sorted(train), sorted(heldout)]


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("wanted", [0, 1, 20, 200])
def test_whole_groups_up_to_a_number_of_rows(texts, wanted):
    groups = groups_of(texts)
    random.Random(7).shuffle(groups)
    heldout = []
    for group in groups:
        if len(heldout) + len(group) <= wanted:
            heldout += group
    found = by_count(digest_array(map(digest, texts)), wanted, random.Random(7))
    assert [list(side) for side in found] == [sorted(set(range(200)) - set(heldout)), sorted(heldout)]


def test_no_rows_are_no_groups():
    assert group_numbers(digest_array([])).tolist() == []
    assert [list(side) for side in by_group(digest_array([]), 0.1, random.Random(1))] == [[], []]


@pytest.mark.parametrize("texts", TEXTS[1:])
def test_a_share_of_every_class(texts):
    given = random.Random(3).choices(("b", "a", 7), k=200)
    heldout = []
    for label in dict.fromkeys(given):
        groups = {}
        for row in range(200):
            if given[row] == label:
                groups.setdefault(texts[row], []).append(row)
        order = list(groups.values())
        random.Random(f"9/{label}").shuffle(order)
        heldout += [row for group in order[: max(1, round(0.2 * len(groups)))] for row in group]
    labels = ["a", "b", 7]
    numbers = np.array([labels.index(label) for label in given])
    train, found = split_classes(labels, numbers, digest_array(map(digest, texts)), 0.2, 9)
    assert [*found] == sorted(heldout)
    assert [*train] == sorted(set(range(200)) - set(heldout))
