"""Data larger than memory: tokenised as it is read, kept on disk, and no different from the same rows in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from byte_tokenizer import ByteTokenizer

from rlhf.data.collate import collate
from rlhf.data.reading import each_conversation, read_conversations
from rlhf.data.sampler import permutation
from rlhf.data.sequences import TokenSequence
from rlhf.data.store import PART, stored
from rlhf.data.tokenize import conversation_sequence, conversation_sequences
from rlhf.errors import DataError
from rlhf.models.cache import default_cache
from rlhf.recipe.base import PathData

MEGABYTES = 60
ALLOWED = 40
"""Megabytes that reading and tokenising may add to a process. Measured: 23, 23 and 39 of 30, 90 and 180 of text."""

CHILD = """
import sys
from pathlib import Path
import psutil
from rlhf.data.reading import each_conversation, read_conversations
from rlhf.data.store import stored
from rlhf.data.tokenize import conversation_sequence
from rlhf.recipe.base import PathData

class Words:
    def conversation_ids(self, messages):
        ids = [len(word) for message in messages for word in message["content"].split()]
        return ids, [True] * len(ids)

def mapped(source):
    return stored(conversation_sequence(row, Words(), 10**6) for row in each_conversation(source))

source = PathData(path=Path(sys.argv[1]))
mapped(source.model_copy(update={"limit": 1}))  # libraries are in memory from here on
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
process = psutil.Process()
before, read = process.memory_info().rss, process.io_counters().read_chars
limited = source.model_copy(update={"limit": int(sys.argv[2]) or None})
rows = (read_conversations if "held" in sys.argv else mapped)(limited)
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
peak = int(status["VmHWM"].split()[0]) * 1024
print(len(rows), peak - before, process.io_counters().read_chars - read)
"""


def chats(count):
    text = "lorem ipsum dolor sit amet "
    return [{"prompt": f"Why {n}?", "completion": text * (1 + n % 7)} for n in range(count)]


def parquet(path, rows, **settings):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)
    return PathData(path=path)


def test_stored_sequences_are_the_ones_that_were_given():
    given = [TokenSequence(tuple(range(n)), tuple(i % 3 == 0 for i in range(n))) for n in range(1, 40)]
    rows = stored(iter(given))
    assert len(rows) == 39
    assert list(rows) == given
    assert rows[-1] == given[-1]
    assert rows[5:9] == given[5:9]
    with pytest.raises(IndexError):
        rows[39]
    assert len(stored(())) == 0


def test_many_parts_are_one_sequence():
    given = [TokenSequence((n,) * 1000, (True,) * 1000) for n in range(3 * PART // 1000)]
    assert list(stored(iter(given))) == given


def test_nothing_is_left_in_the_cache():
    folder = default_cache() / "tokens"
    rows = stored([TokenSequence((1, 2), (False, True))])
    assert list(folder.iterdir()) == []
    assert rows[0].tokens == (1, 2)

    def broken():
        yield TokenSequence((1,), (True,))
        raise DataError("file:2: malformed")

    with pytest.raises(DataError, match="file:2: malformed"):
        stored(broken())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_order_shuffling_and_batches_are_those_of_rows_in_memory(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    rows = chats(300)
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet(path, rows, row_group_size=64)
    source, tokenizer = PathData(path=path), ByteTokenizer()
    held = conversation_sequences(read_conversations(source), tokenizer, 1000)
    mapped = stored(conversation_sequence(row, tokenizer, 1000) for row in each_conversation(source))
    assert list(mapped) == held
    order = permutation(len(mapped), seed=3, epoch=1)[:16]
    one, other = (collate([rows[i] for i in order], pad_id=0) for rows in (held, mapped))
    assert all(getattr(one, name).equal(getattr(other, name)) for name in ("tokens", "attention_mask", "response_mask"))


def test_bad_rows_and_long_ones_are_named_as_ever(tmp_path):
    source = parquet(tmp_path / "rows.parquet", [*chats(3), {"prompt": "x", "completion": None}])
    with pytest.raises(DataError, match=r"rows\.parquet:4: column 'completion' is null"):
        stored(conversation_sequence(row, ByteTokenizer(), 1000) for row in each_conversation(source))
    with pytest.raises(DataError, match=r"rows\.parquet:2: conversation has \d+ tokens, the limit is 50"):
        stored(conversation_sequence(row, ByteTokenizer(), 50) for row in each_conversation(source))


def test_a_limit_asks_for_no_row_beyond_it(tmp_path, monkeypatch):
    from rlhf.data import reading

    asked = []

    def counted(source):
        for record in records(source):
            asked.append(record.number)
            yield record

    records = reading.read_records
    monkeypatch.setattr(reading, "read_records", counted)
    source = parquet(tmp_path / "rows.parquet", chats(50))
    assert len(read_conversations(source.model_copy(update={"limit": 7}))) == 7
    assert asked == [1, 2, 3, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some megabytes of text that hardly compress, in one row group."""
    path = tmp_path_factory.mktemp("large") / "rows.parquet"
    rows, size = MEGABYTES * 250, 4000
    schema = pyarrow.schema([("prompt", pyarrow.string()), ("completion", pyarrow.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none") as writer:
        texts = [os.urandom(size // 2).hex() for _ in range(rows)]
        spaced = [" ".join(text[i : i + 8] for i in range(0, size, 8)) for text in texts]
        writer.write_table(pyarrow.table([[f"Why {n}?" for n in range(rows)], spaced], schema), row_group_size=rows)
    return path


def child(path: Path, limit: int, *mode: str) -> list[int]:
    """Return the rows, and the bytes by which the process grew at its peak and that it read."""
    command = [sys.executable, "-c", CHILD, str(path), str(limit), *mode]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number) for number in result.stdout.split()]


def test_a_large_file_is_never_in_memory(large):
    assert large.stat().st_size > MEGABYTES * 1e6
    rows, grown, _ = child(large, 0)
    assert rows == MEGABYTES * 250
    assert grown < ALLOWED * 1e6
    _, held, _ = child(large, 0, "held")
    assert held > max(2 * grown, MEGABYTES * 1e6)


def test_a_limit_reads_the_start_of_a_large_file(large):
    rows, grown, read = child(large, 100)
    assert rows == 100
    assert read < 8e6
    assert grown < ALLOWED * 1e6
