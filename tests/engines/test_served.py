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


def slept() -> ServedWeights:
    weights = ServedWeights()
    weights.sleep()
    return weights


def publish(weights: ServedWeights) -> None:
    weights.begin()
    with weights.receiving(ANNOUNCEMENT):
        pass
    weights.finish()
    weights.declare(1)


def test_what_arrived_must_be_what_was_sent():
    weights = ServedWeights()
    weights.begin()
    weights.ledger.add(ANNOUNCEMENT | {"checksum": "abc"})
    weights.finish()
    with pytest.raises(TrainingError, match="arrived with checksum abc, but def was sent"):
        weights.declare(7, "def")
    with pytest.raises(TrainingError, match="unfinished"):
        weights.check_serving()


@pytest.mark.parametrize("published", [False, True])
def test_an_engine_that_slept_serves_after_weights_and_cache_are_back(published):
    weights = slept()
    assert weights.wake("weights")
    if published:
        publish(weights)
    with pytest.raises(TrainingError, match="cannot generate: it is asleep"):
        weights.check_serving()
    assert weights.wake("kv_cache")
    weights.check_serving()
    assert weights.served()[0] == int(published)


def test_sleeping_twice_is_sleeping_once():
    weights = ServedWeights()
    assert weights.sleep()
    assert not weights.sleep()


def test_a_sleeping_engine_has_no_room_for_weights():
    weights = slept()
    for attempt in (weights.check_serving, weights.begin):
        with pytest.raises(TrainingError, match=r"asleep|slept"):
            attempt()


def test_what_is_late_for_an_update_that_was_refused_does_not_end_the_sleep():
    weights = slept()
    with pytest.raises(TrainingError, match="asleep"):
        weights.begin()
    with pytest.raises(TrainingError, match=r"no update .* under way"), weights.receiving(ANNOUNCEMENT):
        pytest.fail("not taken in")
    with pytest.raises(TrainingError, match="finished"):
        weights.finish()
    with pytest.raises(TrainingError, match="asleep"):
        weights.begin()


def test_a_failure_on_arrival_voids_the_update():
    weights = ServedWeights()
    weights.begin()
    with pytest.raises(MemoryError), weights.receiving(ANNOUNCEMENT):
        raise MemoryError
    with pytest.raises(TrainingError, match="no weights have arrived"):
        weights.finish()
    publish(weights)
    weights.check_serving()


def test_the_cache_comes_after_the_weights():
    weights = slept()
    with pytest.raises(TrainingError, match="before the weights"):
        weights.wake("kv_cache")


def test_waking_what_is_awake_changes_nothing():
    weights = ServedWeights()
    assert not weights.wake("weights")
    assert not weights.wake("kv_cache")
    weights.check_serving()
    weights = slept()
    weights.wake("weights")
    publish(weights)
    assert not weights.wake("weights")
    weights.wake("kv_cache")
    weights.check_serving()
