"""Data files of every format with exactly one row damaged: the error names that row's line, or the row still loads."""

from __future__ import annotations

import json
import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.reading import read_conversations, read_labelled, read_preferences, read_prompts
from rlhf.errors import DataError
from rlhf.recipe.base import PathData
from tests.chaos.row import Row, only

COUNT = 5000
Values = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A format: what reads it, a row of it, the columns no row may lack, and those that hold messages."""

    read: Callable[[PathData], Any]
    row: Callable[[int], Values]
    needed: tuple[str, ...]
    chats: tuple[str, ...] = ()


def _turns(number: int, answer: str = "Well, {}.") -> list[Values]:
    return [{"role": "user", "content": f"Why {number}?"}, {"role": "assistant", "content": answer.format(number)}]


def _sharegpt(number: int) -> Values:
    said = (("human", "content"), ("gpt", "content"))
    turns = _turns(number)
    return {"conversations": [{"from": who, "value": turn[key]} for (who, key), turn in zip(said, turns, strict=True)]}


KINDS: dict[str, Kind] = {
    "messages": Kind(read_conversations, lambda n: {"messages": _turns(n)}, ("messages",), ("messages",)),
    "sharegpt": Kind(read_conversations, _sharegpt, ("conversations",), ("conversations",)),
    "prompt and completion": Kind(
        read_conversations, lambda n: {"prompt": f"Why {n}?", "completion": f"So {n}."}, ("prompt", "completion")
    ),
    "alpaca": Kind(
        read_conversations,
        lambda n: {"instruction": f"Do {n}.", "input": "", "output": f"Done {n}."},
        ("instruction", "output"),
    ),
    "prompts": Kind(read_prompts, lambda n: {"id": f"p{n}", "prompt": f"Why {n}?", "tags": [n]}, ("prompt",)),
    "prompts as chats": Kind(read_prompts, lambda n: {"prompt": _turns(n)[:1]}, ("prompt",), ("prompt",)),
    "pairs": Kind(
        read_preferences,
        lambda n: {"prompt": f"Why {n}?", "chosen": "yes", "rejected": "no", "margin": 0.5},
        ("prompt", "chosen", "rejected"),
    ),
    "pairs as chats": Kind(
        read_preferences,
        lambda n: {"chosen": _turns(n), "rejected": _turns(n, "No {}.")},
        ("chosen", "rejected"),
        ("chosen", "rejected"),
    ),
    "labelled": Kind(
        read_labelled,
        lambda n: {"prompt": f"Why {n}?", "completion": f"So {n}.", "label": n % 2 == 0},
        ("prompt", "completion", "label"),
    ),
    "labelled pairs": Kind(
        read_labelled, lambda n: {"prompt": f"Why {n}?", "chosen": "yes", "rejected": "no"}, ("chosen", "rejected")
    ),
}


def run(count: int, rng: random.Random) -> Row:
    """Change one row in each of `count` files and read them, with and without leave to skip rows."""
    seen: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "rows.jsonl"
        for _ in range(count):
            kind = KINDS[rng.choice(list(KINDS))]
            lines = [
                json.dumps(kind.row(n), ensure_ascii=rng.random() < 0.5).encode() for n in range(rng.randint(2, 9))
            ]
            at = rng.randrange(len(lines))
            harmless = rng.random() < 0.25
            change = _harmless if harmless else rng.choice((_damaged_text, _damaged_values))
            changed = [*lines[:at], change(kind, lines[at], at, rng), *lines[at + 1 :]]
            path.write_bytes(b"\n".join(changed) + rng.choice((b"\n", b"")))
            outcome = _read_all(kind, path, len(lines)) if harmless else _refused(kind, path, at + 1, len(lines))
            seen.update(("harmless change" if harmless else "damaged", outcome))
    wrong = {what: seen[what] for what in ("wrong line", "unseen", "harmless refused", "other errors", "rows lost")}
    counts = {what: seen[what] for what in ("damaged", "exact line", "harmless change", "read")}
    passed = not any(wrong.values()) and seen["exact line"] + seen["read"] == count
    return Row("mutated JSONL", "exact line for single-row faults", {"injected": count} | counts | wrong, passed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Say nothing about the rows that are skipped."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _refused(kind: Kind, path: Path, line: int, rows: int) -> str:
    """Return what reading a file whose row in `line` is damaged came to; a row cut in two lines is two bad ones."""
    try:
        kind.read(PathData(path=path))
    except DataError as error:
        if not str(error).startswith(f"{path}:{line}: ") or "\n" in str(error):
            return "wrong line"
    except Exception:
        return "other errors"
    else:
        return "unseen"
    return "exact line" if len(kind.read(PathData(path=path, max_bad_rows=2))) == rows - 1 else "rows lost"


def _read_all(kind: Kind, path: Path, rows: int) -> str:
    try:
        return "read" if len(kind.read(PathData(path=path))) == rows else "rows lost"
    except DataError:
        return "harmless refused"
    except Exception:
        return "other errors"


def _damaged_values(kind: Kind, line: bytes, at: int, rng: random.Random) -> bytes:
    """Return well-formed JSON that is no row of its kind."""
    row: Any = json.loads(line)
    name = rng.choice(kind.needed)
    damage = rng.choice(("missing", "value", "value", "nesting", "own", "own"))
    if damage == "missing":
        del row[name]
    elif damage == "value":
        row[name] = rng.choice((None, {}, [], "", " \t ", 7, 1.5, [3], [None], [[row[name]]], {"text": row[name]}))
    elif damage == "nesting":
        row = rng.choice(([row], {"row": row}, [], {}, None, 3, "text", True, list(row)))
    elif kind.chats:
        _damage_chat(row[rng.choice(kind.chats)], rng)
    elif "rejected" in row:
        row |= rng.choice(({"margin": "much"}, {"margin": True}, {"margin": None}, {"rejected": row["chosen"]}))
    elif "label" in row:
        row["label"] = rng.choice(("maybe", 2, -1, 0.5, [True]))
    elif "id" in row:
        row["id"] = rng.choice(([1], True, "", None, 1.5, {}))
    else:
        row = {f"our {key}": value for key, value in row.items()}
    return json.dumps(row).encode()


def _damage_chat(messages: list[Values], rng: random.Random) -> None:
    last = messages[-1]
    who, what = ("from", "value") if "from" in last else ("role", "content")
    match rng.randrange(5):
        case 0:
            last[who] = rng.choice(("bot", "", None, 3, "Assistant", "user" if last[who] != "user" else "assistant"))
        case 1:
            last[what] = rng.choice((None, "", "\n", 3, [], {"text": "x"}))
        case 2:
            del last[rng.choice((who, what))]
        case 3:
            messages.append({who: "system", what: "late"})
        case _:
            messages[rng.randrange(len(messages))] = rng.choice((None, "text", [], 3))  # type: ignore[call-overload]


def _damaged_text(kind: Kind, line: bytes, at: int, rng: random.Random) -> bytes:
    """Return a line that is not JSON, or not UTF-8."""
    place = rng.randrange(1, len(line))
    extra = rng.choice(EXTRA_BAD)
    ways = (
        line[:place],
        line[:-1] + b",}",
        line.replace(b": ", b":, ", 1),
        line.replace(b": ", b" ", 1),
        line.replace(b'"', b"'"),
        line.replace(b'"', b"", 1),
        line.replace(b'"', b'"\n', 1),
        line.replace(b'"', b'"' + bytes([rng.choice((0, 1, 8, 9, 11, 12, 27))]), 1),
        line + rng.choice((b" x", b"}", b",", b"]", b" // why", line, b"\xef\xbb\xbf", b"\x00")),
        rng.choice((b"x", b"[", b"{", b"\x00", b"\xef\xbb\xbf\xef\xbb\xbf")) + line,
        b"\xef\xbb\xbf" + line if at else b"[1",
        line[:place]
        + rng.choice((b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\x80"))
        + line[place:],
        line[:-1] + b", " + extra + b"}",
        line[:-1] + b", " + line[1:],
        b'{"x": "' + b"y" * rng.choice((10, 100_000)),
        b"[" * rng.choice((3, 100_000)),
    )
    return rng.choice(ways)


EXTRA_BAD = (
    b'"x": NaN', b'"x": Infinity', b'"x": -Infinity', b'"x": 1e999', b'"x": "\\ud800"', b'"\\udfff": 1',
    b'"x": 1, "x": 2', b'"x": {"y": 1, "y": 1}', b'"x": 01', b'"x": 0x1', b'"x": .5',
    b'"x": True', b'"x": None', b"x: 1", b'"x": \'y\'',
    b'"x": ' + b"9" * 5000, b'"x": ' + b"[" * 100_000 + b"]" * 100_000, b'"x": "\\q"', b'"x": undefined', b'"x"',
)  # fmt: skip
EXTRA_GOOD = (
    b'"x": null', b'"x": "\\u0000"', b'"x": "\\ud83d\\ude00"', '"x": "\u2028\x85\u202e\ufeff"'.encode(),
    b'"x": 1e-400', b'"x": -0.0', b'"x": {"y": {"y": 1}}', b'"x": ' + b"9" * 4000,
    b'"x": "' + b"z" * 200_000 + b'"', b'"x": ""',
    b'"": 1', b'"x": ' + b"[" * 200 + b"]" * 200, b'"x": "NaN"', b'"x": "\\n\\t\\\\"',
    '"\u4e16": "\U0001f600"'.encode(),
)  # fmt: skip


def _harmless(kind: Kind, line: bytes, at: int, rng: random.Random) -> bytes:
    """Return the same row, written in another way or with one more column."""
    row = json.loads(line)
    ways = (
        line + b"\r",
        b" \t" + line + b"  ",
        b"\n" * rng.randint(1, 3) + line,
        line + b"\n \t\r\n",
        json.dumps(row, separators=(",", ":")).encode(),
        json.dumps(dict(reversed(row.items()))).encode(),
        json.dumps(row).replace("W", "\\u0057").encode(),
        line.replace(b": ", b" :\r\t ", 1),
        line[:-1] + b", " + rng.choice(EXTRA_GOOD) + b"}",
        line[:-1] + b", " + rng.choice(EXTRA_GOOD) + b"}",
        b"\xef\xbb\xbf" + line if at == 0 else line,
    )
    return rng.choice(ways)


if __name__ == "__main__":
    only(run, COUNT)
