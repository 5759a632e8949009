"""Data sources to typed rows: every row is checked by us, and a bad one is an error with its line.

Rows are made one at a time, as they are asked for: `each_...` never holds more of a source than it has just read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.recognise import Layout, Purpose, advice, chosen_layout, layouts, recognised, source_name
from rlhf.data.records import Record, read_records
from rlhf.data.rows import Conversation, LabelledRow, PreferenceRow, PromptRow, TextRow
from rlhf.data.validation import MissingColumn
from rlhf.errors import DataError
from rlhf.recipe.base import Format, HubData, PathData

log = logging.getLogger("rlhf")
Say = Callable[[str], None]
"""Takes what there is to say about a whole source once it has been read: the rows that were skipped, the ties."""

BY_FORMAT: dict[Format, Purpose] = {
    "messages": "conversations",
    "prompt_completion": "conversations",
    "prompts": "prompts",
    "preference": "preferences",
    "hh_rlhf": "preferences",
    "ultrafeedback": "preferences",
    "ranking": "preferences",
    "kto": "labelled",
    "classification": "classes",
}


@dataclass(frozen=True)
class Read:
    """What became of a record: a row, with its format as a recipe calls it and its columns, or an error.

    Of preferences a row is the tuple of a record's pairs, of labelled answers the tuple of its answers.
    """

    row: Any = None
    format: str = ""
    columns: tuple[str, ...] = ()
    error: DataError | None = None


def each_conversation(source: PathData | HubData, say: Say = log.warning) -> Iterator[Conversation]:
    """Yield chats to imitate: `messages`, ShareGPT, prompt + completion or Alpaca.

    With `format: auto` the columns of the first good row decide. Raises DataError at the first bad row beyond
    `max_bad_rows`.
    """
    return _rows(source, "conversations", say)


def each_preference(source: PathData | HubData, say: Say = log.warning) -> Iterator[tuple[PreferenceRow, ...]]:
    """Yield the pairs of each row, none of a tie; errors as in `each_conversation`, and DataError without any pair."""
    rows = pairs = ties = 0
    for row in _rows(source, "preferences", say):
        rows, pairs, ties = rows + 1, pairs + len(row), ties + (not row)
        yield row
    if not pairs:
        raise DataError(f"{source_name(source)}: no pairs, as each of the {rows} rows is a tie")
    if ties:
        say(f"{source_name(source)}: {ties} of {rows} rows are ties and make no pair")


def each_text(source: PathData | HubData, say: Say = log.warning) -> Iterator[TextRow]:
    """Yield texts with their labels; errors as in `each_conversation`."""
    return _rows(source, "classes", say)


def each_labelled(source: PathData | HubData, say: Say = log.warning) -> Iterator[tuple[LabelledRow, ...]]:
    """Yield answers with a label (prompt + completion + label), or pairs: each row's answers, those of a pair together.

    Detection and errors as in `each_conversation`.
    """
    return _rows(source, "labelled", say)


def each_prompt(source: PathData | HubData, say: Say = log.warning) -> Iterator[PromptRow]:
    """Yield prompts to answer; errors as in `each_conversation`."""
    return _rows(source, "prompts", say)


def read_conversations(source: PathData | HubData) -> list[Conversation]:
    """Return what `each_conversation` yields."""
    return list(each_conversation(source))


def read_prompts(source: PathData | HubData) -> Sequence[PromptRow]:
    """Read prompts to answer; they lie on disk and are made when they are asked for. Errors as in `each_prompt`."""
    from rlhf.data.prompts import prompt_rows

    return prompt_rows(source)


def read_preferences(source: PathData | HubData) -> list[PreferenceRow]:
    """Return the pairs of all rows of `each_preference`, one row after the other."""
    return [pair for row in each_preference(source) for pair in row]


def read_labelled(source: PathData | HubData) -> list[tuple[LabelledRow, ...]]:
    """Return what `each_labelled` yields."""
    return list(each_labelled(source))


def survey(source: PathData | HubData, purpose: Purpose) -> Iterator[Read]:
    """Read as for training, but yield every error; damage that hides where rows start ends the reading."""
    rows = 0
    try:
        for item in _adapted(source, purpose):
            yield item
            rows += item.error is None
            if rows == source.limit:
                break
    except DataError as error:
        yield Read(error=error)


def purpose_of(source: PathData | HubData) -> Purpose:
    """Return what a source seems to be for, by its format or by the columns of its first readable row."""
    if source.format != "auto":
        return BY_FORMAT[source.format]
    damage: DataError | None = None
    for item in read_records(source):
        try:
            found = recognised(_renamed(item, source.columns).values)
        except DataError as error:
            damage = damage or error
            continue
        return found[0] if found else "conversations"
    raise damage or DataError(f"{source_name(source)}: no rows")


def _rows(source: PathData | HubData, purpose: Purpose, say: Say) -> Iterator[Any]:
    """Yield the rows up to the limit; skip few bad ones."""
    rows = bad = 0
    first: DataError | None = None
    for item in _adapted(source, purpose):
        if item.error is None:
            rows += 1
            yield item.row
            if rows == source.limit:
                break
            continue
        bad, first = bad + 1, first or item.error
        if bad > source.max_bad_rows:
            raise _too_many(item.error, source.max_bad_rows) from item.error
    if not rows:
        raise DataError(f"{source_name(source)}: no rows" + (f" but bad ones, the first: {first}" if bad else ""))
    if bad:
        say(f"{source_name(source)}: skipped {bad} bad rows, read {rows}; the first: {first}")


def _adapted(source: PathData | HubData, purpose: Purpose) -> Iterator[Read]:
    """Yield what becomes of every record; the first one that makes a row decides the layout of all."""
    fitting = layouts(source, purpose)
    settled: Layout[Any] | None = None
    for item in read_records(source):
        layout = settled
        try:
            record = _renamed(item, source.columns)
        except DataError as error:
            yield Read(error=error)
            continue
        try:
            layout = layout or chosen_layout(record, fitting)
            row = layout.adapt(record)
        except MissingColumn as error:
            yield Read(error=DataError(f"{error}{advice(record, purpose, layout, settled is not None)}"))
        except DataError as error:
            yield Read(error=error)
        else:
            settled = layout
            yield Read(row, layout.format, tuple(record.values))


def _too_many(error: DataError, allowed: int) -> DataError:
    return DataError(f"{error} (bad row {allowed + 1}, max_bad_rows is {allowed})") if allowed else error


def _renamed(item: Record | DataError, columns: dict[str, str]) -> Record:
    """Give the file's columns our names; raise the item if it is an error."""
    if isinstance(item, DataError):
        raise item
    for ours, theirs in columns.items():
        if theirs not in item.values:
            found = ", ".join(item.values) or "none"
            raise DataError(f"{item.where}: column '{theirs}' missing (it is to be our '{ours}'; found: {found})")
    kept = {name: value for name, value in item.values.items() if name not in columns.values()}
    return Record(item.where, item.number, kept | {ours: item.values[theirs] for ours, theirs in columns.items()})
