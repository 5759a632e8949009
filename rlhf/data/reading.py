"""Data sources to typed rows: every row is checked by us, and a bad one is an error with its line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rlhf.data.formats import CONVERSATIONS, LABELLED, Adapter, Row, preference, prompt
from rlhf.data.records import Record, read_records
from rlhf.data.rows import Conversation, LabelledRow, PreferenceRow, PromptRow
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.base import HubData, PathData

log = logging.getLogger(__name__)
Choice = TypeVar("Choice")
Purpose = Literal["conversations", "prompts", "preferences", "labelled"]
Pick = Callable[[Record], Adapter[Row]]


@dataclass(frozen=True)
class Survey:
    """All rows of a source, and what is wrong with the others; `format` and `columns` are of its first good record."""

    format: str
    columns: tuple[str, ...]
    rows: list[Any]
    bad: list[DataError]


def read_conversations(source: PathData | HubData) -> list[Conversation]:
    """Read chats to imitate: `messages`, ShareGPT, prompt + completion or Alpaca.

    With `format: auto` the columns of the first readable row decide. Raises DataError at the first bad row
    beyond `max_bad_rows`.
    """
    return _rows(source, _conversation_adapter(source))


def read_prompts(source: PathData | HubData) -> list[PromptRow]:
    """Read prompts to answer; errors as in `read_conversations`."""
    return _rows(source, _prompt_adapter(source))


def read_preferences(source: PathData | HubData) -> list[PreferenceRow]:
    """Read pairs of answers; errors as in `read_conversations`."""
    return _rows(source, _preference_adapter(source))


def read_labelled(source: PathData | HubData) -> list[tuple[LabelledRow, ...]]:
    """Read answers with a label (prompt + completion + label), or pairs: each row's answers, those of a pair together.

    Detection and errors as in `read_conversations`.
    """
    return _rows(source, _labelled_adapter(source))


def survey(source: PathData | HubData, purpose: Purpose) -> Survey:
    """Read as for training, but collect every error; damage that hides where rows start ends the reading."""
    picks: dict[Purpose, Callable[[PathData | HubData], Pick[Any]]] = {
        "conversations": _conversation_adapter,
        "prompts": _prompt_adapter,
        "preferences": _preference_adapter,
        "labelled": _labelled_adapter,
    }
    seen: list[tuple[str, tuple[str, ...]]] = []
    choose = picks[purpose](source)

    def pick(record: Record) -> Adapter[Any]:
        adapt = choose(record)
        seen.append((adapt.__name__, tuple(record.values)))
        return adapt

    rows: list[Any] = []
    bad: list[DataError] = []
    try:
        for row in _adapted(source, pick):
            if source.limit is not None and len(rows) == source.limit:
                break
            (bad if isinstance(row, DataError) else rows).append(row)
    except DataError as error:
        bad.append(error)
    return Survey(*(seen[0] if seen else ("unknown", ())), rows, bad)


def purpose_of(source: PathData | HubData) -> Purpose:
    """Return what a source seems to be for, by its format or by the columns of its first readable row."""
    by_format: dict[str, Purpose] = {"prompts": "prompts", "preference": "preferences", "kto": "labelled"}
    if source.format != "auto":
        return by_format.get(source.format, "conversations")
    damage: DataError | None = None
    for item in read_records(source):
        try:
            columns = _renamed(item, source.columns).values.keys()
        except DataError as error:
            damage = damage or error
            continue
        if columns & {"chosen", "rejected"}:
            return "preferences"
        if "label" in columns:
            return "labelled"
        known = {name for table in CONVERSATIONS.values() for name in table} - {"prompt"}
        return "prompts" if "prompt" in columns and not columns & known else "conversations"
    raise damage or DataError(f"{_name(source)}: no rows")


def _conversation_adapter(source: PathData | HubData) -> Pick[Conversation]:
    return _recognise(source, CONVERSATIONS, "chats to imitate")


def _prompt_adapter(source: PathData | HubData) -> Pick[PromptRow]:
    adapt = _for_format(source, {"auto": prompt, "prompts": prompt}, "prompts")
    return lambda record: adapt


def _preference_adapter(source: PathData | HubData) -> Pick[PreferenceRow]:
    adapt = _for_format(source, {"auto": preference, "preference": preference}, "preference pairs")
    return lambda record: adapt


def _labelled_adapter(source: PathData | HubData) -> Pick[tuple[LabelledRow, ...]]:
    return _recognise(source, LABELLED, "labelled answers")


def _recognise(source: PathData | HubData, tables: Mapping[str, dict[str, Adapter[Row]]], purpose: str) -> Pick[Row]:
    """Return what chooses the adapter of a record: the first column that its format's table knows."""
    known = {"auto": {name: adapt for table in tables.values() for name, adapt in table.items()}}
    adapters = _for_format(source, {**known, **tables}, purpose)

    def pick(record: Record) -> Adapter[Row]:
        for name, adapt in adapters.items():
            if name in record.values:
                return adapt
        found = ", ".join(record.values) or "none"
        raise DataError(f"{record.where}: no known columns (found: {found}; known: {', '.join(adapters)})")

    return pick


def _name(source: PathData | HubData) -> str:
    return str(source.path) if isinstance(source, PathData) else f"{source.hub}[{source.split}]"


def _for_format(source: PathData | HubData, table: Mapping[str, Choice], purpose: str) -> Choice:
    if source.format not in table:
        raise RecipeError(f"{_name(source)}: format '{source.format}' does not hold {purpose} (use {', '.join(table)})")
    return table[source.format]


def _rows(source: PathData | HubData, pick: Pick[Row]) -> list[Row]:
    """Return the rows up to the limit; skip few bad ones."""
    rows: list[Row] = []
    bad: list[DataError] = []
    for row in _adapted(source, pick):
        if source.limit is not None and len(rows) == source.limit:
            break
        if not isinstance(row, DataError):
            rows.append(row)
            continue
        bad.append(row)
        if len(bad) > source.max_bad_rows:
            raise _too_many(row, source.max_bad_rows) from row
    if not rows:
        raise DataError(f"{_name(source)}: no rows" + (f" but bad ones, the first: {bad[0]}" if bad else ""))
    if bad:
        log.warning("%s: skipped %d bad rows, read %d; the first: %s", _name(source), len(bad), len(rows), bad[0])
    return rows


def _adapted(source: PathData | HubData, pick: Pick[Row]) -> Iterator[Row | DataError]:
    """Yield every record as a row, or its error, with the adapter that `pick` chooses for the first readable one."""
    adapt: Adapter[Row] | None = None
    for item in read_records(source):
        row: Row | DataError
        try:
            record = _renamed(item, source.columns)
            adapt = adapt or pick(record)
            row = adapt(record)
        except DataError as error:
            row = error
        yield row


def _too_many(error: DataError, allowed: int) -> DataError:
    return DataError(f"{error} (bad row {allowed + 1}, max_bad_rows is {allowed})") if allowed else error


def _renamed(item: Record | DataError, columns: dict[str, str]) -> Record:
    """Give the file's columns our names; raise the item if it is an error."""
    if isinstance(item, DataError):
        raise item
    for ours, theirs in columns.items():
        if theirs not in item.values:
            raise DataError(f"{item.where}: column '{theirs}' missing (it is to be our '{ours}')")
    kept = {name: value for name, value in item.values.items() if name not in columns.values()}
    return Record(item.where, item.number, kept | {ours: item.values[theirs] for ours, theirs in columns.items()})
