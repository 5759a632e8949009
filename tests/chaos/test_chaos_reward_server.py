import random

from tests.chaos.reward_server import run


def test_nothing_that_a_reward_server_says_becomes_a_silent_zero_or_nan():
    row = run(60, random.Random(5))
    assert row.passed, str(row)
    assert row.counts["recovered by retry"]
    assert row.counts["errors said"]
    assert row.counts["groups skipped"]
