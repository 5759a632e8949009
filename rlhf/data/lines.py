"""JSON lines that one stage writes and a later one reads: rows are dataclasses, floats keep all their bits."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from rlhf.errors import DataError

Row = TypeVar("Row")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one dataclass a line as JSON. ValueError on a number that is not finite."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(asdict(row), ensure_ascii=False, allow_nan=False) + "\n")


def read_lines(path: Path, rows: TypeAdapter[Row]) -> list[Row]:
    """Read what `write_lines` wrote; DataError names the file and line of damage."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line:
            continue
        try:
            found.append(rows.validate_json(line, strict=True))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{path}:{number}: {place + ': ' if place else ''}{first['msg']}") from error
    return found
