"""`done.json`: read as it was written, or an error with a remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf.done_file import Damaged, damage, file_digests, read_done, write_done
from rlhf.errors import ResourceError

DONE = {"key": "0123456789ab", "content": {"stage": {"kind": "sft"}, "rate": 0.1 + 0.2}, "summary": {3: float("inf")}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "sft").mkdir()
    write_done(tmp_path / "sft" / "done.json", DONE)
    return tmp_path / "sft" / "done.json"


def test_it_is_read_as_it_was_written(file):
    assert read_done(file) == DONE | {"summary": {"3": float("inf")}}
    assert [path.name for path in file.parent.iterdir()] == ["done.json"]


def test_one_without_a_checksum_is_of_an_older_version(file):
    file.write_text(json.dumps({"key": "k", "content": {"stage": {"kind": "sft"}}}))
    assert read_done(file)["key"] == "k"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '{"key": "k"}', '{"key": "k", "content": {"stage": []}}', "[" * 100_000, "\xff"],
)
def test_anything_else_is_damage(file, text):
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(Damaged, match=r"sft is damaged \(done.json: truncated or changed\); put the file back, or"):
        read_done(file)


def test_every_changed_byte_is_damage(file):
    data, before, found = file.read_bytes(), read_done(file), 0
    for place in range(0, len(data), 7):
        file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert read_done(file) == before  # white space
        except Damaged:
            found += 1
    assert found > len(data) // 14


def test_a_folder_in_its_place_is_damage_and_what_cannot_be_read_now_is_not(file, monkeypatch):
    file.unlink()
    file.mkdir()
    with pytest.raises(Damaged, match=r"done.json: is a directory"):
        read_done(file)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ResourceError, match="cannot be read: Permission denied; mend that and run again"):
        read_done(file)


def test_files_of_older_versions_are_checked_too(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}")
    done = {"pairs": file_digests(tmp_path)}
    assert damage(tmp_path, done) == []
    (tmp_path / "pairs.jsonl").write_text("{ }")
    assert damage(tmp_path, done) == ["pairs.jsonl: changed"]
