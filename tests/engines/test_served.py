"""An engine's weights are served only when they are whole and have a version."""

import pytest

from rlhf.engines.served import Ledger, ServedWeights
from rlhf.errors import TrainingError

ANNOUNCEMENT = {"names": ["w", "b"], "dtype_names": ["bfloat16", "float32"], "shapes": [[2, 3], [4]]}


def test_a_whole_update_is_served_under_its_version():
    weights = ServedWeights()
    weights.check_serving()
    assert weights.served() == (0, "")
    weights.begin()
    weights.ledger.add(ANNOUNCEMENT | {"checksum": "abc"})
    weights.finish()
    assert weights.declare(7) == (7, "abc") == weights.served()
    weights.check_serving()


def test_nothing_is_served_before_the_version_is_declared():
    weights = ServedWeights()
    for step in (weights.begin, lambda: weights.ledger.add(ANNOUNCEMENT), weights.finish):
        step()
        with pytest.raises(TrainingError, match="unfinished"):
            weights.check_serving()


def test_a_version_needs_weights():
    weights = ServedWeights()
    with pytest.raises(TrainingError, match="version 1 was declared"):
        weights.declare(1)
    weights.begin()
    with pytest.raises(TrainingError, match="no weights have arrived"):
        weights.finish()
    weights.ledger.add(ANNOUNCEMENT)
    with pytest.raises(TrainingError, match="version 1 was declared"):
        weights.declare(1)


def test_ledger_counts_bytes_and_prefers_the_checksum_of_the_contents():
    ledger = Ledger()
    ledger.add(ANNOUNCEMENT | {"checksum": "one"})
    ledger.add(ANNOUNCEMENT | {"checksum": "two"})
    assert (ledger.checksum, ledger.bytes) == ("two", 2 * (6 * 2 + 4 * 4))


@pytest.mark.parametrize(
    "other",
    [{"names": ["w", "c"]}, {"dtype_names": ["float16", "float32"]}, {"shapes": [[3, 2], [4]]}],
    ids=["name", "dtype", "shape"],
)
def test_ledger_of_descriptions_tells_apart(other):
    one, same, different = Ledger(), Ledger(), Ledger()
    one.add(ANNOUNCEMENT)
    same.add(ANNOUNCEMENT | {"shapes": [(2, 3), (4,)]})
    different.add(ANNOUNCEMENT | other)
    assert one.checksum == same.checksum != different.checksum
