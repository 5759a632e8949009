"""How many tokens the rows of a recipe's data have: of all rows of a small file, of the first rows of a large one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlhf.data.inspection import uses
from rlhf.data.parts import items, parts
from rlhf.data.reading import survey
from rlhf.errors import DataError
from rlhf.recipe.base import PathData
from rlhf.recipe.row_lengths import RowLengths
from rlhf.recipe.schema import Recipe

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer

ROWS = 2000
"""Measured of a source; a longer one is not measured whole."""


def measured_lengths(recipe: Recipe, tokenizer: ChatTokenizer) -> dict[str, RowLengths]:
    """Measure the local files of a recipe by the keys that name them: `stages.sft.data`.

    Left out are datasets of the hub, and files that cannot be read or have no readable row: what is wrong with them is
    said by those who train on them.
    """
    found = {}
    for use in uses(recipe):
        if not isinstance(use.source, PathData):
            continue
        with suppress(DataError, OSError):
            rows = (item.row for item in survey(use.source, use.purpose) if item.error is None)
            if lengths := row_lengths(rows, tokenizer):
                found.update(dict.fromkeys(use.keys, lengths))
    return found


def row_lengths(rows: Iterable[Any], tokenizer: ChatTokenizer) -> RowLengths | None:
    """Measure at most `ROWS` rows, each a row or a tuple of rows of `rlhf.data.rows`; None where there is none."""
    remaining = iter(rows)
    totals, longest = [], 0
    for row in islice(remaining, ROWS):
        with suppress(DataError):  # of a row that the template refuses
            sizes = list(_sizes(row, tokenizer))
            totals.append(sum(flat for flat, _ in sizes))
            longest = max(longest, *(whole for _, whole in sizes)) if sizes else longest
    if not totals:
        return None
    return RowLengths(sum(totals) / len(totals), longest, complete=next(remaining, None) is None)


def _sizes(row: Any, tokenizer: ChatTokenizer) -> Iterator[tuple[int, int]]:
    """Yield, for each item of a row, its tokens with a shared prompt counted once, and its longest sequence."""
    for item in items(row):
        made = [sequence for _, sequence in parts(item, tokenizer)]
        answers = sum(sum(sequence.response_mask) for sequence in made)
        prompt = max((len(sequence.tokens) - sum(sequence.response_mask) for sequence in made), default=0)
        yield prompt + answers, max((len(sequence.tokens) for sequence in made), default=0)
