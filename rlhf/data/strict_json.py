"""JSON as RFC 8259 means it: no NaN, no infinities, no key twice, no half characters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from rlhf.errors import DataError


def parse_object(text: str, where: str) -> dict[str, Any]:
    """Parse one JSON object; `where` (`file:line`) starts the message of the DataError raised for anything else."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair, which is no character") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON is nested too deeply") from error
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a row must be an object, not {type_name(value)}")
    return value


def array_items(text: str, file: str) -> Iterator[tuple[int, str]]:
    """Yield (line, source text) of each element of the JSON array that is the whole of `text`."""
    decoder = json.JSONDecoder()
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        raise DataError(f"{file}:{_line(text, position)}: a .json file must hold an array of objects")
    position = _skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{file}:{error.lineno}: malformed JSON: {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise DataError(f"{file}:{_line(text, position)}: JSON is nested too deeply") from error
        yield _line(text, position), text[position:end]
        position = _skip_space(text, end)
        if text[position : position + 1] == ",":
            position = _skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise DataError(f"{file}:{_line(text, position)}: malformed JSON: expected ',' or ']' between rows")
    rest = _skip_space(text, position + 1)
    if rest != len(text):
        raise DataError(f"{file}:{_line(text, rest)}: malformed JSON: text after the array")


def type_name(value: object) -> str:
    """Return what a JSON value is, in words with an article."""
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array"}
    if value is None:
        return "null"
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key '{key}'")
        result[key] = value
    return result


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits} is too large")
    return value


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
