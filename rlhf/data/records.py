"""Data files and hub datasets as plain records, each with its place; nothing is interpreted yet.

A record that cannot be read is yielded as its error, so that the caller may skip a bounded number of them;
damage that hides where the next row starts is raised.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.data.json_array import array_items
from rlhf.data.strict_json import parse_object
from rlhf.errors import DataError
from rlhf.recipe.base import HubData, PathData

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Record:
    """One row: `number` is its line in a text file, or its count from 1; `where` names it in messages."""

    where: str
    number: int
    values: dict[str, Any]


Records = Iterator[Record | DataError]

READ_ROWS, READ_BYTES, PIECE = 64, 1 << 20, 1 << 16
"""Of a parquet file, what is read at once: rows, and bytes of a column; of a JSON array, bytes."""


def read_records(source: PathData | HubData) -> Records:
    """Yield the records of a jsonl, json, csv or parquet file or of a hub dataset, or their errors."""
    if isinstance(source, HubData):
        return _hub(source)
    if not source.path.is_file():
        raise DataError(f"{source.path}: no such file")
    readers: dict[str, Callable[[Path], Records]]
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(source.path.suffix.lower())
    if reader is None:
        raise DataError(f"{source.path}: unknown kind of file (use {', '.join(readers)})")
    return reader(source.path)


def _jsonl(path: Path) -> Records:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = _decode(line, f"{path}:{number}").strip(" \t\r\n")
                if text:
                    yield Record(f"{path}:{number}", number, parse_object(text, f"{path}:{number}"))
            except DataError as error:
                yield error


def _json(path: Path) -> Records:
    for number, item in array_items(_text_pieces(path), str(path)):
        try:
            yield Record(f"{path}:{number}", number, parse_object(item, f"{path}:{number}"))
        except DataError as error:
            yield error


def _csv(path: Path) -> Records:
    rows = csv.reader(_text_lines(path), strict=True)
    header: list[str] = []
    number = 1
    try:
        for row in rows:
            where = f"{path}:{number}"
            if not header:
                header = _csv_header(row, where)
            elif row and len(row) != len(header):
                yield DataError(f"{where}: {len(row)} fields, the header has {len(header)}")
            elif row:
                yield Record(where, number, dict(zip(header, row, strict=True)))
            number = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{number}: malformed CSV: {error}") from error


def _csv_header(names: list[str], where: str) -> list[str]:
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        raise DataError(f"{where}: column '{twice[0]}' stands twice in the header")
    return names


def _parquet(path: Path) -> Records:
    """Yield the rows, few of them in memory at a time however large the file or its row groups are."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=READ_BYTES, pre_buffer=False) as file:
            batches = file.iter_batches(batch_size=READ_ROWS, use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Record(f"{path}:{number}", number, row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not readable as parquet: {error}") from error


def hub_table(source: HubData) -> Dataset:
    """Load a dataset, which the library maps into memory; DataError where it cannot."""
    import datasets

    try:
        return datasets.load_dataset(source.hub, split=source.split, revision=source.revision)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(f"{source.hub}[{source.split}]: cannot be loaded: {error}") from error


def _hub(source: HubData) -> Records:
    for number, row in enumerate(hub_table(source), start=1):
        yield Record(f"{source.hub}[{source.split}]:{number}", number, row)


def _text_lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _decode(line, f"{path}:{number}")


def _text_pieces(path: Path) -> Iterator[str]:
    """Yield the text in pieces that are no lines: a whole file may be one line."""
    number, column, pending = 1, 1, b""
    with path.open("rb") as file:
        while (piece := file.read(PIECE)) or pending:
            data = pending + piece
            try:
                text, pending = data.decode("utf-8"), b""
            except UnicodeDecodeError as error:
                before = data[: error.start]
                if not piece or error.reason != "unexpected end of data":
                    lines = before.count(b"\n")
                    column = error.start - before.rfind(b"\n") if lines else column + error.start
                    where = f"{path}:{number + lines}"
                    raise DataError(
                        f"{where}: not UTF-8 (byte 0x{data[error.start]:02x} at column {column})"
                    ) from error
                text, pending, data = before.decode("utf-8"), data[error.start :], before
            yield text.removeprefix("\ufeff") if number == column == 1 else text
            lines = data.count(b"\n")
            number += lines
            column = len(data) - data.rfind(b"\n") if lines else column + len(data)


def _decode(line: bytes, where: str) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(f"{where}: not UTF-8 (byte 0x{byte:02x} at column {error.start + 1})") from error
    return text.removeprefix("\ufeff") if where.endswith(":1") else text
