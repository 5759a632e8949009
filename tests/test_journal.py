"""What a journal has appended is whole or not there."""

import pytest

from rlhf.journal import Cut, Journal

ROWS = [{"step": 1, "loss": 0.5}, {"step": 2, "text": "a\nb é"}, {"step": 3}]


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path / "rows.jsonl")
    made.append(ROWS)
    return made


def test_rows_come_back(journal):
    assert list(journal.rows()) == ROWS
    assert journal.append([{"step": 4}]) == journal.flush() == journal.path.stat().st_size


def test_a_missing_file_is_empty(tmp_path):
    journal = Journal(tmp_path / "none.jsonl")
    assert (list(journal.rows()), journal.flush()) == ([], 0)
    assert (journal.cut(), journal.cut(9)) == (Cut(0, False), Cut(0, True))
    assert not journal.path.exists()


def test_every_truncation_keeps_the_whole_rows(journal):
    data = journal.path.read_bytes()
    ends = [place + 1 for place, letter in enumerate(data) if letter == ord("\n")]
    for size in range(len(data)):
        journal.path.write_bytes(data[:size])
        whole = sum(end <= size for end in ends)
        assert journal.cut(len(data)) == Cut(whole, short=True)
        assert list(journal.rows()) == ROWS[:whole]
        journal.append(ROWS[whole:])
        assert journal.path.read_bytes() == data


def test_a_file_full_of_zeros_behind_its_rows_is_cut(journal):
    data = journal.path.read_bytes()
    journal.path.write_bytes(data + b"\0" * 4096)
    assert list(journal.rows()) == ROWS
    assert journal.cut(len(data)) == Cut(3, False)
    assert journal.path.read_bytes() == data


def test_nothing_behind_a_damaged_row_is_used(journal):
    data = journal.path.read_bytes()
    journal.path.write_bytes(data.replace(b'"step": 2', b'"step"; 2'))
    assert list(journal.rows()) == ROWS[:1]


def test_cut_forgets_what_came_later(journal):
    first = len(journal.path.read_bytes().splitlines(keepends=True)[0])
    assert journal.cut(first) == Cut(1, False)
    assert list(journal.rows()) == ROWS[:1]


def test_only_finite_numbers(journal):
    with pytest.raises(ValueError, match="not JSON compliant"):
        journal.append([{"loss": float("nan")}])
    assert list(journal.rows()) == ROWS
