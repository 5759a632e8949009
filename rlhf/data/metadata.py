"""The columns of a prompt that reach the judge, as they are written beside it on disk and come back equal.

JSON holds what text files can say. Parquet files and hub datasets also have dates, times, decimals and bytes, which a
row in Arrow's own format holds.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

ARROW = "arrow:"


def packed(metadata: Mapping[str, Any]) -> str | None:
    """Return the columns as text; None where they hold objects of which neither format gives back the same."""
    if _plain(metadata):
        return json.dumps(metadata, ensure_ascii=False)
    import pyarrow

    try:
        table = pyarrow.Table.from_pylist([dict(metadata)])
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        text = ARROW + base64.b64encode(sink.getvalue()).decode()
        return text if _same(unpacked(text), dict(metadata)) else None
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError):
        return None


def unpacked(text: str) -> dict[str, Any]:
    """Return what `packed` has written."""
    if not text.startswith(ARROW):
        found: dict[str, Any] = json.loads(text)
        return found
    import pyarrow

    with pyarrow.ipc.open_stream(base64.b64decode(text.removeprefix(ARROW))) as reader:
        row: dict[str, Any] = reader.read_all().to_pylist()[0]
        return row


def _plain(value: Any) -> bool:
    """Return whether JSON gives back the same value, of the same types."""
    if type(value) is dict:
        return all(type(name) is str and _plain(inner) for name, inner in value.items())
    if type(value) is list:
        return all(map(_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other) or (one != one and other != other)
