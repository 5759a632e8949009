"""The best samples survive the trip through a file bit by bit, and damage is named."""

import pytest

from rlhf.data.best import Best, best_sequences, read_best, write_best
from rlhf.errors import DataError

BEST = Best("17", "caf\u00e9\u2028?", (1, 2), {"n": 1, "deep": [1.5, None]}, "yes \ufffd\n", (3, 9), 0.1 + 0.2)


def test_round_trip_is_exact(tmp_path):
    write_best(tmp_path / "best.jsonl", [BEST, BEST])
    assert read_best(tmp_path / "best.jsonl") == [BEST, BEST]


def test_a_score_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_best(tmp_path / "best.jsonl", [Best("1", "p", (1,), {}, "r", (2,), float("inf"))])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"response_tokens": [3, 9]', '"response_tokens": [3, "9"]', "response_tokens.1: Input should be a valid"),
        ('"score": 0.3', '"mark": 0.3', "score: Field required"),
        ("}", "", "Invalid JSON: EOF while parsing an object"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, old, new, message):
    path = tmp_path / "best.jsonl"
    write_best(path, [BEST, BEST])
    good = path.read_text(encoding="utf-8").split("\n")[0]
    path.write_text(f"{good}\n{good.replace(old, new)}\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_best(path)
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_empty_and_missing_files_are_named(tmp_path):
    (tmp_path / "best.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"best.jsonl:1: no samples"):
        read_best(tmp_path / "best.jsonl")
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        read_best(tmp_path / "gone.jsonl")


def test_sequences_are_the_stored_ids_with_the_response_marked():
    (sequence,) = best_sequences([BEST])
    assert sequence.tokens == (1, 2, 3, 9)
    assert sequence.response_mask == (False, False, True, True)
