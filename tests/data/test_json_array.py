"""A JSON array is read element by element, whatever the pieces are in which its text comes."""

import json
import random
import tracemalloc

import pytest

from rlhf.data import json_array, records
from rlhf.data.json_array import array_items
from rlhf.data.records import Record, read_records
from rlhf.errors import DataError
from rlhf.recipe.base import PathData

ROWS = [{"a": "x\n]},{", "b": [1, {"c": None}]}, {"é🙂": 'q"\\'}, 12.5, [], "t", True, -1e3]
TEXTS = [json.dumps(ROWS), json.dumps(ROWS, indent=2), " \n[ ]\n", "[1 ,2\n,\n3]", json.dumps(ROWS, ensure_ascii=False)]


def cut(text, seed):
    random_ = random.Random(seed)
    while text:
        size = random_.randint(1, 7)
        yield text[:size]
        text = text[size:]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("window", [1, 3, 1 << 16])
def test_elements_do_not_depend_on_pieces(monkeypatch, text, window):
    monkeypatch.setattr(json_array, "WINDOW", window)
    for seed in range(10):
        found = list(array_items(cut(text, seed), "f.json"))
        assert [json.loads(item) for _, item in found] == json.loads(text)
        for line, item in found:
            assert text.split("\n", line - 1)[-1].find(item.split("\n")[0]) >= 0


DAMAGE = {
    '[{"a": 1}, {"a" 2}]': "f.json:1: malformed JSON: Expecting ':' delimiter at column 17",
    '[{"a": 1},\n {"a" 2}]': "f.json:2: malformed JSON: Expecting ':' delimiter at column 7",
    '[{"a": 1}\n {"a": 2}]': "f.json:2: malformed JSON: expected ',' or ']' between rows",
    '[{"a": 1},\n': "f.json:2: malformed JSON: Expecting value at column 1",
    '[{"a": "1},\n': "f.json:1: malformed JSON: Invalid control character at at column 12",
    '[{"a": "1},': "f.json:1: malformed JSON: Unterminated string starting at at column 8",
    '\n{"a": 1}': "f.json:2: a .json file must hold an array of objects",
    "[1]\n\n[2]": "f.json:3: malformed JSON: text after the array",
    "[" * 100_000: "f.json:1: JSON is nested too deeply",
    "[": "f.json:1: malformed JSON: Expecting value at column 2",
}


@pytest.mark.parametrize("text", DAMAGE)
@pytest.mark.parametrize("window", [2, 1 << 16])
def test_damage_is_named_by_line_and_column(monkeypatch, text, window):
    monkeypatch.setattr(json_array, "WINDOW", window)
    with pytest.raises(DataError) as error:
        list(array_items(cut(text, 1), "f.json"))
    assert str(error.value) == DAMAGE[text]


def test_text_that_is_not_utf8_is_named_wherever_pieces_end(monkeypatch, tmp_path):
    path = tmp_path / "f.json"
    for size in (1, 2, 3, 5, 1 << 16):
        monkeypatch.setattr(records, "PIECE", size)
        path.write_bytes('\ufeff["é🙂",\n "é", 1]'.encode())
        errors = [str(item) for item in read_records(PathData(path=path))]
        assert errors[0] == f"{path}:1: a row must be an object, not a string"
        assert errors[2] == f"{path}:2: a row must be an object, not an integer"
        path.write_bytes(b'["a",\n "\xc3\xa9\xff"]')
        with pytest.raises(DataError, match=r"f\.json:2: not UTF-8 \(byte 0xff at column 5\)"):
            list(read_records(PathData(path=path)))


def test_a_large_file_of_one_line_is_never_in_memory(tmp_path):
    path = tmp_path / "f.json"
    peaks = []
    for rows in (1_000, 6_000):
        path.write_text(json.dumps([{"text": "word " * 50, "n": n} for n in range(rows)]))
        tracemalloc.start()
        assert sum(isinstance(item, Record) for item in read_records(PathData(path=path))) == rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
