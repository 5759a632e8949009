"""Prompts on disk: equal to those in memory, with whatever their metadata holds."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizer import ByteTokenizer

from rlhf.data import kept
from rlhf.data.metadata import packed, unpacked
from rlhf.data.reading import each_prompt, read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.errors import DataError
from rlhf.recipe.base import PathData

VALUES = [
    {},
    {"a": 1, "b": [1.5, None, {"c": "é\n"}], "": True},
    {"nan": float("inf"), "big": 10**30},
    {"day": datetime.date(2024, 2, 29), "n": 1},
    {"at": datetime.datetime(2024, 2, 29, 1, 2, 3, 4), "raw": b"\x00\xff", "d": decimal.Decimal("1.50")},
    {"deep": [{"day": datetime.date(2024, 1, 1)}, {"day": None}]},
    {"text": "arrow:"},
]


@pytest.mark.parametrize("metadata", VALUES, ids=map(str, range(len(VALUES))))
def test_metadata_comes_back_equal(metadata):
    text = packed(metadata)
    assert text is not None
    found = unpacked(text)
    assert found == metadata
    assert json.dumps(found, default=repr) == json.dumps(metadata, default=repr)


@pytest.mark.parametrize("metadata", [{"o": object()}, {"t": (1, 2)}, {"mixed": [1, "a", b"x"]}])
def test_metadata_that_no_format_gives_back_is_not_written(metadata):
    assert packed(metadata) is None


@pytest.fixture
def keep_all(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)


def test_rows_are_those_of_the_file(tmp_path, keep_all):
    path = tmp_path / "p.jsonl"
    rows = [{"id": f"p{n}", "prompt": f"Why é {n}?", "answer": [n, None]} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    source = PathData(path=path)
    for _ in range(2):
        assert list(read_prompts(source)) == list(each_prompt(source))
        assert read_prompts(source)[3:5] == list(each_prompt(source))[3:5]
    assert read_prompts(source)[29].where == f"{path}:59"


def test_parquet_dates_reach_the_judge(tmp_path, keep_all):
    path = tmp_path / "p.parquet"
    rows = [{"prompt": "Why?", "day": datetime.date(2024, 2, day), "raw": bytes([day])} for day in range(1, 9)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    for _ in range(2):
        prompts = tokenize_prompts(read_prompts(PathData(path=path)), ByteTokenizer(), 100)
        assert [prompt.metadata for prompt in prompts] == [{"day": row["day"], "raw": row["raw"]} for row in rows]


def test_odd_objects_stay_in_memory_and_the_file_is_not_kept(tmp_path, keep_all, monkeypatch):
    from rlhf.data import prompts

    monkeypatch.setattr(prompts, "packed", lambda metadata: None if metadata["n"] == 2 else packed(metadata))
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "Why?", "n": n}) + "\n" for n in range(4)))
    for _ in range(2):
        assert [row.metadata for row in read_prompts(PathData(path=path))] == [{"n": n} for n in range(4)]
    assert list((tmp_path / "cache" / kept.FOLDER).iterdir()) == []


def test_an_id_used_twice_is_named_with_the_first(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"id": name, "prompt": "Why?"}) + "\n" for name in "abcb"))
    with pytest.raises(DataError) as error:
        tokenize_prompts(read_prompts(PathData(path=path)), ByteTokenizer(), 100)
    assert str(error.value) == f"{path}:4: prompt id 'b' is taken already, by {path}:2"


def test_ids_of_one_digest_are_still_two_ids(tmp_path, monkeypatch):
    from rlhf.data import prompts

    monkeypatch.setattr(prompts, "digest", lambda _: b"same" * 4)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"id": name, "prompt": "Why?"}) + "\n" for name in "abc"))
    assert len(tokenize_prompts(read_prompts(PathData(path=path)), ByteTokenizer(), 100)) == 3
