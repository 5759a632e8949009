"""Scored responses and chats as files of JSON lines, written and read row by row."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rlhf.disk import failures_told
from rlhf.errors import DataError
from rlhf.report.samples import ChatScores, Columns, Sample, Samples, Texts

Row = TypeVar("Row")
NUMBERS = ("score", "kl", "entropy")
TEXTS = ("prompt_id", "prompt", "response", "finish_reason")


def write_samples(path: Path, rows: Iterable[Sample]) -> Samples:
    """Write responses as they come, one a line, flush them, and return them with their texts in the file."""
    columns, offsets = Columns(), array("q")

    def lines() -> Iterator[bytes]:
        end = 0
        for row in rows:
            columns.add(row)
            offsets.append(end)
            line = _line(_content(row))
            end += len(line)
            yield line

    _write(path, lines())
    return columns.samples(_texts(path, offsets))


def read_samples(path: Path) -> Samples:
    """Read the numbers; texts are read when they are asked for. DataError names the line of damage."""
    columns, offsets, end = Columns(), array("q"), 0
    for place, line in _lines(path):
        columns.add(_parsed(place, line, _sample))
        offsets.append(end)
        end += len(line)
    return columns.samples(_texts(path, offsets))


def write_chat_scores(path: Path, scores: ChatScores) -> None:
    """Write the scores of chats, one a line, and flush them."""
    pairs = zip(scores.nats.tolist(), scores.tokens.tolist(), strict=True)
    _write(path, (_line({"nats": _number(nats), "tokens": int(tokens)}) for nats, tokens in pairs))


def read_chat_scores(path: Path) -> ChatScores:
    """Read what `write_chat_scores` wrote; DataError names the line of damage."""
    nats, tokens = array("d"), array("q")
    for place, line in _lines(path):
        one, count = _parsed(place, line, lambda found: (float(found["nats"]), int(found["tokens"])))
        nats.append(one)
        tokens.append(count)
    return ChatScores.of(nats, tokens)


def _write(path: Path, lines: Iterable[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with failures_told(path, "cannot be written"), path.open("wb") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield each line with its place, `file:line`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield f"{path}:{number}", line
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; run the compare stage again") from error


def _parsed(place: str, line: bytes, read: Callable[[dict[str, Any]], Row]) -> Row:
    try:
        return read(json.loads(line))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: not what a compare stage writes ({type(error).__name__}: {error})") from error


def _texts(path: Path, offsets: array[int]) -> Texts:
    def texts(row: int) -> tuple[str, str]:
        with path.open("rb") as file:
            file.seek(offsets[row])
            found = json.loads(file.readline())
        return found["prompt"], found["response"]

    return texts


def _content(row: Sample) -> dict[str, Any]:
    return {
        "prompt_id": row.prompt_id,
        "prompt": row.prompt,
        "response": row.response,
        "score": _number(row.gold),
        "reward": None if row.reward is None else _number(row.reward),
        "kl": _number(row.kl),
        "entropy": _number(row.entropy),
        "tokens": row.tokens,
        "finish_reason": row.finish_reason,
    }


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"  # a lone surrogate is an escape in JSON too


def _number(value: float) -> float | str:
    """Return a number as JSON may hold it."""
    return value if math.isfinite(value) else str(value)


def _sample(found: dict[str, Any]) -> Sample:
    texts = {name: found[name] for name in TEXTS}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError(f"one of {', '.join(TEXTS)} is no text")
    reward = None if found["reward"] is None else float(found["reward"])
    gold, kl, entropy = (float(found[name]) for name in NUMBERS)
    return Sample(gold=gold, reward=reward, kl=kl, tokens=int(found["tokens"]), entropy=entropy, **texts)
