"""JSON lines that one stage writes and a later one reads: rows are dataclasses, floats keep all their bits."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rlhf.data.lazy import Lazy
from rlhf.errors import DataError

Row = TypeVar("Row")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one dataclass a line as JSON. ValueError on a number that is not finite."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n")


def each_line(path: Path, rows: TypeAdapter[Row]) -> Iterator[Row]:
    """Yield what `write_lines` wrote, row by row; DataError names the file and line of damage."""
    for number, _, line in _lines(path):
        yield _parsed(path, number, line, rows)


def read_lines(path: Path, rows: TypeAdapter[Row]) -> list[Row]:
    """Return all that `each_line` yields."""
    return list(each_line(path, rows))


def lazy_lines(path: Path, rows: TypeAdapter[Row]) -> Lazy[Row]:
    """Return the rows of a file that no longer changes: each is read again whenever it is asked for.

    DataError names the file and line of damage, when that row is asked for.
    """
    numbers, starts, sizes = array("q"), array("q"), array("q")
    for number, start, line in _lines(path):
        numbers.append(number)
        starts.append(start)
        sizes.append(len(line))
    file = path.open("rb")

    def row(index: int) -> Row:
        return _parsed(path, numbers[index], os.pread(file.fileno(), sizes[index], starts[index]), rows)

    return Lazy(row, len(starts))


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number, offset and content of each line that is not empty."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line != b"\n":
                yield number, start, line
            start += len(line)


def _parsed(path: Path, number: int, line: bytes, rows: TypeAdapter[Row]) -> Row:
    try:
        return rows.validate_json(line.removesuffix(b"\n"), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}:{number}: {place + ': ' if place else ''}{first['msg']}") from error
