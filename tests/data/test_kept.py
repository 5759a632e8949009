"""Tokenised data that is kept by content: found again, made anew where anything differs, and whole or not there."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from byte_tokenizer import ByteTokenizer

from rlhf.data import kept, tokenized
from rlhf.data.kept import FOLDER, PARTIAL, SUFFIX, find, write
from rlhf.data.tokenized import Encoder, tokenized_answers, tokenized_chats, tokenized_pairs
from rlhf.errors import DataError
from rlhf.models.cache import default_cache
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.recipe.base import PathData


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)
    return tmp_path / "cache" / FOLDER


class Counting(ByteTokenizer):
    """Counts the prompts it encodes."""

    def __init__(self, name="bytes"):
        self.name, self.asked = name, 0

    def identity(self):
        return self.name

    def completion_pair_ids(self, messages, responses):
        self.asked += 1
        return super().completion_pair_ids(messages, responses)


def pairs(path: Path, rows: int = 5, **settings: object) -> PathData:
    made = [{"prompt": f"Why {n}?", "chosen": "yes" * (n + 1), "rejected": "no"} for n in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return PathData(path=path, **settings)


def test_the_second_time_nothing_is_encoded(tmp_path, cache):
    tokenizer = Counting()
    source = pairs(tmp_path / "a.jsonl")
    first = list(tokenized_pairs(source, Encoder(tokenizer, 100)))
    assert tokenizer.asked == 5
    again = tokenized_pairs(source, Encoder(tokenizer, 100))
    assert (list(again), tokenizer.asked) == (first, 5)
    moved = pairs(tmp_path / "elsewhere.jsonl")
    assert (list(tokenized_pairs(moved, Encoder(tokenizer, 100))), tokenizer.asked) == (first, 5)
    assert [path.suffix for path in cache.iterdir()] == [SUFFIX]


@pytest.mark.parametrize("changed", ["bytes", "limit", "columns", "max_length", "tokenizer", "kind", "code"])
def test_whatever_bears_on_the_tokens_makes_them_anew(tmp_path, cache, monkeypatch, changed):
    from rlhf.data import content

    source = pairs(tmp_path / "a.jsonl")
    tokenized_pairs(source, Encoder(Counting(), 100))
    tokenizer, length, read = Counting("other" if changed == "tokenizer" else "bytes"), 100, tokenized_pairs
    if changed == "bytes":
        source.path.write_text(source.path.read_text().replace("Why 3", "How 3"))
    elif changed == "limit":
        source = source.model_copy(update={"limit": 4})
    elif changed == "columns":
        source = source.model_copy(update={"columns": {"chosen": "rejected", "rejected": "chosen"}})
    elif changed == "max_length":
        length = 101
    elif changed == "kind":
        read = tokenized_answers
    elif changed == "code":
        monkeypatch.setattr(content, "TOKENISING", 2)
    read(source, Encoder(tokenizer, length))
    assert len(list(cache.iterdir())) == 2


def test_small_files_are_made_again_and_leave_nothing(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(kept, "KEPT_BYTES", 1 << 20)
    tokenizer = Counting()
    for _ in range(2):
        rows = tokenized_pairs(pairs(tmp_path / "a.jsonl"), Encoder(tokenizer, 100))
        assert list(cache.iterdir()) == []
    assert (len(rows), tokenizer.asked) == (10, 10)


def test_an_error_is_kept_of_nothing_and_comes_again(tmp_path, cache):
    source = pairs(tmp_path / "a.jsonl")
    with source.path.open("a") as file:
        file.write('{"prompt": "x"}\n')
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl:6: column 'chosen' missing"):
            tokenized_pairs(source, Encoder(Counting(), 100))
        assert list(cache.iterdir()) == []


@pytest.mark.parametrize("place", ["first", "middle", "last", "short", "empty", "longer"])
def test_a_damaged_file_is_made_anew(tmp_path, cache, place):
    source, tokenizer = pairs(tmp_path / "a.jsonl"), Counting()
    first = list(tokenized_pairs(source, Encoder(tokenizer, 100)))
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    if place in ("first", "middle", "last"):
        content[{"first": 0, "middle": len(content) // 2, "last": -1}[place]] ^= 1
    else:
        content = {"short": content[:-7], "empty": bytearray(), "longer": content + b"x"}[place]
    path.write_bytes(content)
    assert list(tokenized_pairs(source, Encoder(tokenizer, 100))) == first
    assert tokenizer.asked == 10
    assert list(tokenized_pairs(source, Encoder(tokenizer, 100))) == first
    assert tokenizer.asked == 10


def test_a_source_that_changes_while_it_is_read_is_not_kept(tmp_path, cache):
    source = pairs(tmp_path / "a.jsonl")

    class Changing(Counting):
        def completion_pair_ids(self, messages, responses):
            os.utime(source.path, ns=(1, 1))
            return super().completion_pair_ids(messages, responses)

    assert len(tokenized_pairs(source, Encoder(Changing(), 100))) == 10
    assert list(cache.iterdir()) == []


def test_what_was_said_while_it_was_made_is_said_again(tmp_path, caplog):
    source = pairs(tmp_path / "a.jsonl", max_bad_rows=1)
    with source.path.open("a") as file:
        file.write("{\n")
    for name in ("a.jsonl", "b.jsonl"):
        source = PathData(path=source.path.rename(tmp_path / name), max_bad_rows=1)
        tokenized_pairs(source, Encoder(Counting(), 100))
        assert [record.getMessage() for record in caplog.records] == [
            f"{tmp_path}/{name}: skipped 1 bad rows, read 5; the first: {tmp_path}/{name}:6: malformed JSON: Expecting"
            " property name enclosed in double quotes at column 2"
        ]
        caplog.clear()


def test_use_is_marked_for_pruning(tmp_path, cache):
    source = pairs(tmp_path / "a.jsonl")
    tokenized_pairs(source, Encoder(Counting(), 100))
    (path,) = cache.iterdir()
    os.utime(path, (1, 1))
    tokenized_pairs(source, Encoder(Counting(), 100))
    assert path.stat().st_mtime > 1


KILLED = """
import sys, time
import pyarrow
from rlhf.data.kept import write
schema = pyarrow.schema([("n", pyarrow.int32())])
def batches():
    yield pyarrow.RecordBatch.from_pydict({"n": [1]}, schema)
    print("writing", flush=True)
    time.sleep(600)
write("key", schema, batches())
"""


def test_what_a_killed_process_leaves_is_removed_by_the_next(cache):
    process = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    schema = pyarrow.schema([("n", pyarrow.int32())])
    write(None, schema, ())
    (partial,) = cache.iterdir()  # its process lives
    assert partial.name.startswith(".key-")
    assert partial.name.endswith(f".{process.pid}{PARTIAL}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    write(None, schema, ())
    assert list(cache.iterdir()) == []
    assert find("key") is None


def test_real_chats_come_back_with_their_masks(tmp_path, tiny_tokenizer: ChatTokenizer):
    path = tmp_path / "c.jsonl"
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path.write_text(json.dumps({"messages": chat * 3}) + "\n")
    for _ in range(2):
        (row,) = tokenized_chats(PathData(path=path), Encoder(tiny_tokenizer, 1000))
        tokens, mask = tiny_tokenizer.conversation_ids(chat * 3)
        assert (row.tokens, row.response_mask) == (tuple(tokens), tuple(mask))


def test_progress_is_told_while_rows_are_read(monkeypatch):
    monkeypatch.setattr(tokenized, "INTERVAL_S", 0.0)
    said: list[str] = []
    assert list(tokenized.reported(range(600), "a.jsonl", said.append)) == list(range(600))
    assert [line.split(",")[0] for line in said] == ["tokenises a.jsonl: 256 rows", "tokenises a.jsonl: 512 rows"]


def test_the_cache_is_where_the_environment_says(cache):
    assert default_cache() / FOLDER == cache
