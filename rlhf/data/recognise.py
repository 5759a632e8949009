"""Which format a record is of, and what to tell whoever expected another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from rlhf.data import formats, preferences
from rlhf.data.records import Record
from rlhf.data.validation import MissingColumn
from rlhf.errors import RecipeError
from rlhf.recipe.base import Format, HubData, PathData

Row = TypeVar("Row")
Purpose = Literal["conversations", "preferences", "labelled", "classes", "prompts"]


@dataclass(frozen=True)
class Layout(Generic[Row]):
    """One way to write rows.

    format  what the recipe calls it; several layouts may share one
    adapt   makes a record a row
    needs   the columns that it cannot do without, any of which gives it away
    when    what else must be true of a record's values to take it for this
    """

    format: Format
    adapt: Callable[[Record], Row]
    needs: tuple[str, ...]
    when: Callable[[Mapping[str, Any]], bool] = lambda values: True

    def given_away(self, values: Mapping[str, Any]) -> bool:
        """Return whether a record seems to be meant so."""
        return any(name in values for name in self.needs) and self.when(values)


PAIR = ("chosen", "rejected")
LAYOUTS: dict[Purpose, tuple[Layout[Any], ...]] = {
    "conversations": (
        Layout("messages", formats.openai_messages, ("messages",)),
        Layout("messages", formats.sharegpt, ("conversations",)),
        Layout("prompt_completion", formats.prompt_completion, ("prompt", "completion")),
        Layout("prompt_completion", formats.alpaca, ("instruction", "output")),
    ),
    "preferences": (
        Layout("hh_rlhf", preferences.hh_rlhf, PAIR, preferences.is_transcript),
        Layout("ultrafeedback", preferences.ultrafeedback, ("completions", "instruction")),
        Layout("ultrafeedback", preferences.ultrafeedback_binarized, ("score_chosen", "score_rejected", *PAIR),
               lambda values: "score_chosen" in values or "score_rejected" in values),
        Layout("ranking", preferences.ranking, ("ranking", "responses", "prompt"),
               lambda values: "ranking" in values or "responses" in values),
        Layout("preference", preferences.preference, PAIR),
    ),
    "labelled": (
        Layout("kto", formats.labelled, ("label", "completion", "prompt"),
               lambda values: "label" in values or "completion" in values),
        Layout("hh_rlhf", preferences.unpaired, PAIR, preferences.is_transcript),
        Layout("preference", preferences.unpaired, PAIR),
    ),
    "classes": (Layout("classification", formats.classification, ("text", "label")),),
    "prompts": (Layout("prompts", formats.prompt, ("prompt",)),),
}  # fmt: skip
"""By what is wanted of a source, the layouts that hold it: the first one that a record gives away is taken."""

HOLDS: dict[Purpose, str] = {
    "conversations": "chats to imitate",
    "preferences": "preference pairs",
    "labelled": "labelled answers",
    "classes": "texts with a label",
    "prompts": "prompts",
}
OTHER_NAMES = {
    "prompt": ("question", "query", "instruction", "input", "user"),
    "completion": ("answer", "response", "output", "reply", "target", "assistant"),
    "chosen": ("better", "preferred", "accepted", "winner", "good", "positive"),
    "rejected": ("worse", "dispreferred", "loser", "bad", "negative"),
    "messages": ("conversation", "dialogue", "dialog", "chat", "turns"),
    "text": ("sentence", "review", "content", "comment", "document", "body"),
    "label": ("class", "category", "sentiment", "intent", "topic", "target", "labels", "stars"),
    "responses": ("answers", "candidates", "outputs"),
    "ranking": ("order", "rank"),
}
"""Our columns -> what others commonly call them, for advice alone."""


def layouts(source: PathData | HubData, purpose: Purpose) -> tuple[Layout[Any], ...]:
    """Return the layouts that a source may have; RecipeError when its `format` is of another purpose."""
    known = LAYOUTS[purpose]
    fitting = tuple(layout for layout in known if source.format in ("auto", layout.format))
    if not fitting:
        names = ", ".join(dict.fromkeys(["auto", *(layout.format for layout in known)]))
        raise RecipeError(
            f"{source_name(source)}: format '{source.format}' does not hold {HOLDS[purpose]} (use {names})"
        )
    return fitting


def chosen_layout(record: Record, fitting: tuple[Layout[Any], ...]) -> Layout[Any]:
    """Return the layout of a record, the only one where there is no choice; DataError when it has no known column."""
    if len(fitting) == 1:
        return fitting[0]
    for layout in fitting:
        if layout.given_away(record.values):
            return layout
    found = ", ".join(record.values) or "none"
    known = ", ".join(dict.fromkeys(name for layout in fitting for name in layout.needs))
    raise MissingColumn(f"{record.where}: no known columns (found: {found}; known: {known})")


def recognised(values: Mapping[str, Any]) -> tuple[Purpose, Layout[Any]] | None:
    """Return what a record seems to be, whatever was wanted: the layout of which it has the most; None if nothing."""
    best: tuple[Purpose, Layout[Any]] | None = None
    most = (0.0, 0)
    for purpose, known in LAYOUTS.items():
        for layout in known:
            present = sum(name in values for name in layout.needs)
            score = (present / len(layout.needs), present)
            if score > most and layout.when(values):
                best, most = (purpose, layout), score
    return best


def advice(record: Record, purpose: Purpose, layout: Layout[Any] | None, begun: bool) -> str:
    """Return what helps with a record that lacks a column of `layout`, to follow the error; "" where nothing does.

    `layout` is None where no column is known; `begun` says that records before it were of that layout.
    """
    found = recognised(record.values)
    renamed = "" if begun else _renaming(record, LAYOUTS[purpose] if layout is None else (layout, *LAYOUTS[purpose]))
    if not renamed and found and _is_rather(found[1], layout, record.values):
        looks = f"; this row looks like {_named(found[1])} (columns {', '.join(found[1].needs)})"
        if begun and layout:
            return f"{looks}, those before it are {_named(layout)}: a file holds rows of one format"
        if any(allowed.format == found[1].format for allowed in LAYOUTS[purpose]):
            return f"{looks}: set format: {found[1].format}"
        return f"{looks}, which holds {HOLDS[found[0]]}, but {HOLDS[purpose]} are wanted here"
    return renamed


def source_name(source: PathData | HubData) -> str:
    """Return how messages call a source."""
    return str(source.path) if isinstance(source, PathData) else f"{source.hub}[{source.split}]"


def _is_rather(other: Layout[Any], layout: Layout[Any] | None, values: Mapping[str, Any]) -> bool:
    """Return whether a record has all columns of another layout, and more than it has of `layout`."""
    if not all(name in values for name in other.needs):
        return False
    if layout is None or other.needs == layout.needs:
        return layout is None or _named(other) != _named(layout)
    return len(other.needs) > sum(name in values for name in layout.needs)


def _named(layout: Layout[Any]) -> str:
    name = layout.adapt.__name__
    return name if name in ("sharegpt", "alpaca", "ultrafeedback_binarized") else layout.format


def _renaming(record: Record, fitting: tuple[Layout[Any], ...]) -> str:
    """Return the `columns:` that would give a record all that one of the layouts needs, by what columns are called."""
    for layout in fitting:
        names = {}
        for ours in layout.needs:
            theirs = next((name for name in OTHER_NAMES.get(ours, ()) if name in record.values), None)
            if ours not in record.values and theirs:
                names[ours] = theirs
        if names and all(name in record.values or name in names for name in layout.needs):
            pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in names.items())
            return f"; perhaps columns: {{{pairs}}}"
    return ""
