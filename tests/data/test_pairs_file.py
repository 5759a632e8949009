"""Stage-written pairs survive the trip through a file bit by bit."""

import tracemalloc
from dataclasses import replace

import pytest

from rlhf.data.pairs import Pair, each_pair, lazy_pairs, pair_sequences, read_pairs, write_pairs
from rlhf.errors import DataError

PAIR = Pair(
    prompt_id="17",
    prompt="caf\u00e9\u2028?",
    prompt_tokens=(1, 2),
    metadata={"aspect": "size", "n": 1, "deep": {"list": [1.5, None]}},
    chosen="yes \ufffd\n",
    chosen_tokens=(3, 9),
    rejected="no",
    rejected_tokens=(4, 5, 9),
    chosen_score=0.1 + 0.2,
    rejected_score=1e-17,
    flipped=False,
    heldout=True,
)


def test_round_trip_is_exact(tmp_path):
    pairs = [PAIR, replace(PAIR, prompt_id="18", flipped=True, heldout=False, rejected_score=-3.0)]
    write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert read_pairs(tmp_path / "pairs.jsonl") == pairs
    first = (tmp_path / "pairs.jsonl").read_bytes()
    write_pairs(tmp_path / "pairs.jsonl", read_pairs(tmp_path / "pairs.jsonl"))
    assert (tmp_path / "pairs.jsonl").read_bytes() == first


def test_pairs_read_as_they_are_asked_for_are_those_of_the_whole_file(tmp_path):
    path, pairs = tmp_path / "pairs.jsonl", [replace(PAIR, prompt_id=f"{n}", chosen="\u00e9" * n) for n in range(9)]
    write_pairs(path, pairs)
    lazy = lazy_pairs(path)
    assert [lazy[place] for place in (8, 0, 4)] == [pairs[8], pairs[0], pairs[4]]
    assert list(lazy) == lazy[:] == list(each_pair(path)) == pairs
    path.write_text(path.read_text(encoding="utf-8").replace('"prompt_id": "3"', '"prompt_id": 33'), encoding="utf-8")
    damaged = lazy_pairs(path)
    assert damaged[2] == pairs[2]
    with pytest.raises(DataError, match=r"pairs.jsonl:4: prompt_id: Input should be a valid string"):
        _ = damaged[3]


def test_pairs_that_are_not_asked_for_take_no_memory(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, (replace(PAIR, chosen_tokens=tuple(range(1000, 3000))) for _ in range(400)))
    tracemalloc.start()
    sequences = pair_sequences(lazy_pairs(path))
    assert sum(len(pair.chosen.tokens) for pair in sequences) == 400 * 2002
    assert tracemalloc.get_traced_memory()[1] < 1_000_000 < path.stat().st_size
    tracemalloc.stop()


def test_a_score_that_is_not_finite_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        write_pairs(tmp_path / "pairs.jsonl", [replace(PAIR, chosen_score=float("nan"))])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"chosen_tokens": [3, 9]', '"chosen_tokens": [3, "9"]', "chosen_tokens.1: Input should be a valid integer"),
        ('"heldout": true', '"held": true', "heldout: Field required"),
        ('"flipped": false', '"flipped": 0', "flipped: Input should be a valid boolean"),
    ],
)
def test_damage_is_named(tmp_path, old, new, message):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [PAIR, PAIR])
    good = path.read_text(encoding="utf-8").split("\n")[0]
    path.write_text(f"{good}\n{good.replace(old, new)}\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_pairs(path)
    assert str(error.value) == f"{path}:2: {message}"


def test_cut_empty_and_missing_files_are_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [PAIR])
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"pairs.jsonl:1: Invalid JSON: EOF"):
        read_pairs(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"pairs.jsonl:1: no pairs"):
        read_pairs(path)
    with pytest.raises(DataError, match=r"gone.jsonl: no such file"):
        read_pairs(tmp_path / "gone.jsonl")


def test_sequences_are_the_stored_ids_and_tell_nothing_of_the_scores():
    (pair,) = pair_sequences([PAIR])
    assert pair.chosen.tokens == (1, 2, 3, 9)
    assert pair.chosen.response_mask == (False, False, True, True)
    assert pair.rejected.tokens == (1, 2, 4, 5, 9)
    assert pair.rejected.response_mask == (False, False, True, True, True)
    assert pair.margin == 0.0
