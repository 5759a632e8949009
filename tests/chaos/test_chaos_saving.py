"""A few interrupted saves and damaged states of those that `python -m tests.chaos` makes."""

import random

import pytest

from tests.chaos import corruption, saving


@pytest.mark.parametrize(("row", "count"), [(saving, 40), (corruption, 42)])
def test_nothing_is_lost_or_unseen(row, count):
    done = row.run(count, random.Random(3))
    assert done.passed, str(done)
    assert count in done.counts.values()
