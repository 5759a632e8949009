"""A few of the failing runs and damaged files that `python -m tests.chaos` makes."""

import random

import pytest

from tests.chaos import finished, run_files


@pytest.mark.parametrize(("row", "count"), [(finished, 10), (run_files, 6)])
def test_nothing_finished_is_lost(row, count):
    done = row.run(count, random.Random(4))
    assert done.passed, str(done)
    assert count in done.counts.values()
