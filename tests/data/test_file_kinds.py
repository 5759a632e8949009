"""json, csv, parquet and hub sources: same rows as jsonl, and their own kinds of damage."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.reading import read_preferences, read_prompts
from rlhf.errors import DataError
from rlhf.recipe.base import HubData, PathData

ROWS = [
    {"prompt": "tea?", "chosen": "Gladly,\nsir.", "rejected": 'No, "never".', "margin": 0.5},
    {"prompt": "\u00fcber", "chosen": "yes", "rejected": "no", "margin": 2.0},
]


def prompts_of(path, **settings):
    return read_prompts(PathData(path=path, **settings))


def error_of(path, text, **settings):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        prompts_of(path, **settings)
    return str(error.value).removeprefix(str(path))


def as_csv(path):
    lines = ["prompt,chosen,rejected,margin", 'tea?,"Gladly,\nsir.","No, ""never"".",0.5', "\u00fcber,yes,no,2.0"]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


WRITERS = {
    "jsonl": (lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in ROWS)), [1, 2]),
    "json": (lambda path: path.write_text(json.dumps(ROWS, indent=1)), [2, 8]),
    "csv": (as_csv, [2, 4]),
    "parquet": (lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path), [1, 2]),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_rows_and_their_places(tmp_path, kind):
    path = tmp_path / f"pairs.{kind}"
    write, lines = WRITERS[kind]
    write(path)
    rows = read_preferences(PathData(path=path))
    assert [row.where for row in rows] == [f"{path}:{line}" for line in lines]
    for row, expected in zip(rows, ROWS, strict=True):
        assert row.prompt == ({"role": "user", "content": expected["prompt"]},)
        assert (row.chosen, row.rejected, row.margin) == (
            expected["chosen"], expected["rejected"], expected["margin"],
        )  # fmt: skip


def test_a_hub_dataset_names_its_split_and_row(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    WRITERS["jsonl"][0](tmp_path / "hub" / "train.jsonl")
    hub = str(tmp_path / "hub")
    rows = read_preferences(HubData(hub=hub))
    assert [row.where for row in rows] == [f"{hub}[train]:1", f"{hub}[train]:2"]
    assert [row.chosen for row in rows] == ["Gladly,\nsir.", "yes"]
    with pytest.raises(DataError) as error:
        read_preferences(HubData(hub=hub, columns={"chosen": "best"}))
    assert str(error.value) == (
        f"{hub}[train]:1: column 'best' missing (it is to be our 'chosen'; found: prompt, chosen, rejected, margin)"
    )
    with pytest.raises(DataError, match=r"hub\[test\]: cannot be loaded: .*split"):
        read_preferences(HubData(hub=hub, split="test"))


def test_an_unknown_hub_dataset_is_a_data_error(tmp_path):
    with pytest.raises(DataError) as error:
        read_prompts(HubData(hub=str(tmp_path / "none")))
    assert str(error.value).startswith(f"{tmp_path}/none[train]: cannot be loaded: ")


def test_damaged_json(tmp_path):
    path = tmp_path / "p.json"
    assert error_of(path, "") == ": no rows"
    assert error_of(path, " [ ]") == ": no rows"
    assert error_of(path, '\n{"prompt": "p"}') == ":2: a .json file must hold an array of objects"
    assert error_of(path, '[{"prompt": "p"},\n\n{"prompt": }]') == ":3: malformed JSON: Expecting value at column 12"
    assert error_of(path, '[{"prompt": "p"}\n{"prompt": "q"}]') == (
        ":2: malformed JSON: expected ',' or ']' between rows"
    )
    assert error_of(path, '[{"prompt": "p"}]\n x') == ":2: malformed JSON: text after the array"
    assert error_of(path, '[{"prompt": "p"},\n 3]') == ":2: a row must be an object, not an integer"
    assert error_of(path, '[{"prompt": "p"},\n {"prompt": "a", "prompt": "b"}]') == ":2: duplicate key 'prompt'"
    assert error_of(path, '[{"prompt": "p"},\n {"prompt": "a", "x": NaN}]') == ":2: NaN is not a JSON number"
    assert error_of(path, b'[\n{"prompt": "\xff"}]') == ":2: not UTF-8 (byte 0xff at column 13)"
    assert error_of(path, "[" * 100_000) == ":1: JSON is nested too deeply"
    path.write_text('[{"prompt": "p"},\n 3,\n{"prompt": "q"}]')
    assert [row.text for row in prompts_of(path, max_bad_rows=1)] == ["p", "q"]


def test_damaged_csv(tmp_path):
    path = tmp_path / "p.csv"
    assert error_of(path, "") == ": no rows"
    assert error_of(path, "prompt,x\n") == ": no rows"
    assert error_of(path, "prompt,prompt\na,b\n") == ":1: column 'prompt' stands twice in the header"
    assert error_of(path, "prompt,x\na,1\nb\n") == ":3: 1 fields, the header has 2"
    assert error_of(path, 'prompt,x\n"a\nb",1\n,2\n') == ":4: column 'prompt' is empty"
    assert error_of(path, 'prompt,x\na,"b\n') == ":2: malformed CSV: unexpected end of data"
    assert error_of(path, b"prompt,x\na,1\n\xe9,2\n") == ":3: not UTF-8 (byte 0xe9 at column 1)"


def test_damaged_parquet(tmp_path):
    path = tmp_path / "p.parquet"
    assert error_of(path, "not parquet at all").startswith(": not readable as parquet: ")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    with pytest.raises(DataError) as error:
        prompts_of(path)
    assert str(error.value) == f"{path}:2: column 'prompt' is null"


def test_a_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path):
    for name, text in (("p.jsonl", '{"prompt": "a"}\r\n{"prompt": "b"}\r\n'), ("p.csv", "prompt\r\na\r\nb\r\n")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [row.text for row in prompts_of(tmp_path / name)] == ["a", "b"]


def test_a_limit_stops_before_later_rows_are_looked_at(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert [row.text for row in prompts_of(path, limit=2)] == ["a", "b"]
