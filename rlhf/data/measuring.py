"""What inspection asks of each row and what takes time: its tokens, and whether it is like another."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from rlhf.data.content import digest
from rlhf.data.parts import items, parts, spelled
from rlhf.errors import DataError

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer

NAMES = ("where", "id")


@dataclass
class Measures:
    """Sums and lists over some rows.

    lengths   numbers of tokens by part of a row
    contents  16 bytes for each row that says something, to find it again
    refused   what the chat template or the tokenizer refuses
    too_long  where rows are that exceed the limit
    spelled   how many rows spell each control token
    """

    lengths: dict[str, array[int]] = field(default_factory=dict)
    contents: bytearray = field(default_factory=bytearray)
    refused: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
    spelled: Counter[str] = field(default_factory=Counter)


def measured(rows: Iterable[Any], tokenizer: ChatTokenizer | None, limit: int | None) -> Measures:
    """Measure rows; without a tokenizer nothing is said about tokens."""
    made = Measures()
    for row in rows:
        if items(row):
            made.contents += digest(_content(row))
        if tokenizer is not None:
            _tokens(row, tokenizer, limit, made)
    return made


def _tokens(row: Any, tokenizer: ChatTokenizer, limit: int | None, made: Measures) -> None:
    try:
        found = [part for item in items(row) for part in parts(item, tokenizer)]
    except DataError as error:
        made.refused.append(str(error))
        return
    for name, sequence in found:
        made.lengths.setdefault(name, array("i")).append(len(sequence.tokens))
        if any(sequence.response_mask):
            made.lengths.setdefault(f"{name}, trained", array("i")).append(sum(sequence.response_mask))
    if limit is not None and any(len(sequence.tokens) > limit for _, sequence in found):
        made.too_long.append(items(row)[0].where)
    made.spelled.update(spelled(row, tokenizer))


def _content(row: Any) -> str:
    """Return a row without its place and its name."""
    return json.dumps([_said(item) for item in items(row)], default=str)


def _said(item: Any) -> Mapping[str, Any]:
    return {one.name: getattr(item, one.name) for one in fields(item) if one.name not in NAMES}
