"""What stands in the data of a recipe, or in one file, before any of it is trained on."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.data.classes import Labels
from rlhf.data.content import digest
from rlhf.data.encoding import characters
from rlhf.data.measuring import Measures, measured
from rlhf.data.parts import Segment, example_of
from rlhf.data.reading import Purpose, purpose_of, survey
from rlhf.data.recognise import source_name
from rlhf.data.rows import TextRow
from rlhf.data.splits import group_numbers
from rlhf.data.workers import in_parts, worked
from rlhf.errors import DataError
from rlhf.recipe.base import HubData, PathData
from rlhf.recipe.preference_schema import KtoStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import ClassifyStage, SftStage, Stage

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer

SHOWN, REASONS = 5, 1000
OTHERS = "other reasons"
Progress = Callable[[int], None]


def _unseen(_: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Use:
    """What a source is read for: by which keys of a recipe, and how many tokens of a row which setting allows."""

    source: PathData | HubData
    purpose: Purpose
    keys: tuple[str, ...] = ()
    setting: str = ""
    limit: int | None = None


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens over the rows; `p95` is the smallest that 95 % of the rows do not exceed."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True)
class Inspection:
    """One source.

    bad         how many rows cannot be used; `bad_rows` says so of the first, `reasons` counts them by what is wrong
    counts      what the rows come to: pairs and ties, desirable answers and others, texts of each label
    lengths     tokens by part of a row, with the chat template; empty without a tokenizer
    too_long    rows over the limit of `use`, and `first_too_long` the first of them: they stop a run
    duplicates  rows that repeat an earlier one
    spelled     how many rows spell each control token of the tokenizer, which is encoded as its letters
    example     the first row (of a ranking, its first pair) by part, as (text, whether it is trained on); with the
                template where there is a tokenizer
    refusals    what would stop a run
    """

    use: Use
    name: str
    format: str
    columns: tuple[str, ...]
    rows: int
    bad: int
    bad_rows: tuple[str, ...]
    reasons: Mapping[str, int]
    counts: Mapping[str, int]
    lengths: Mapping[str, Lengths]
    too_long: int
    first_too_long: str
    duplicates: int
    spelled: Mapping[str, int]
    example: Mapping[str, tuple[Segment, ...]]
    refusals: tuple[str, ...]


def inspect_source(use: Use, tokenizer: ChatTokenizer | None, progress: Progress = _unseen) -> Inspection:
    """Read a whole source once and describe it; DataError when there is no such file or dataset.

    Of each row a few numbers and digests are kept. `progress` takes the number of rows read so far.
    """
    tally = Tally(use, tokenizer)
    rows = in_parts(tally.readable(progress), characters)
    work = partial(measured, tokenizer=tokenizer, limit=use.limit)
    for found in worked(work, rows) if tokenizer else map(work, rows):
        tally.add(found)
    return tally.described()


def inspect_recipe(recipe: Recipe, tokenizer: ChatTokenizer | None, progress: Progress = _unseen) -> list[Inspection]:
    """Describe every file and dataset that a recipe reads, each once per purpose and limit."""
    return [inspect_source(use, tokenizer, progress) for use in uses(recipe)]


def inspect_file(source: PathData, tokenizer: ChatTokenizer | None, progress: Progress = _unseen) -> Inspection:
    """Describe one file, for what its format or columns say it is for."""
    return inspect_source(Use(source, purpose_of(source)), tokenizer, progress)


def uses(recipe: Recipe) -> list[Use]:
    """Return what the stages read from files and datasets; stages that read the same in the same way are one use."""
    merged: dict[str, Use] = {}
    for stage in recipe.stages:
        for use in _stage_uses(stage):
            same = repr(replace(use, keys=()))
            known = merged.get(same, replace(use, keys=()))
            merged[same] = replace(known, keys=(*known.keys, *use.keys))
    return list(merged.values())


def _stage_uses(stage: Stage) -> Iterator[Use]:
    purpose: Purpose = "preferences"
    if isinstance(stage, SftStage):
        purpose = "conversations"
    elif isinstance(stage, KtoStage):
        purpose = "labelled"
    elif isinstance(stage, ClassifyStage):
        purpose = "classes"
    read: tuple[tuple[str, Purpose, str], ...] = (
        ("data", purpose, "max_length"),
        ("prompts", "prompts", "max_prompt_tokens"),
        ("seeds", "conversations", ""),
        ("retention", "conversations", ""),
    )
    for key, kind, setting in read:
        source = getattr(stage, key, None)
        if isinstance(source, PathData | HubData):
            limit = getattr(stage, setting) if setting else None
            yield Use(source, kind, (f"stages.{stage.name}.{key}",), setting, limit)


class Tally:
    """What is known of the rows of a source, as they are read."""

    def __init__(self, use: Use, tokenizer: ChatTokenizer | None) -> None:
        self.use, self.tokenizer = use, tokenizer
        self.layout: tuple[str, tuple[str, ...]] = ("unknown", ())
        self.good = 0
        self.bad, self.refused = Refused(), Refused()
        self.counts = Counter(pairs=0, ties=0) if use.purpose == "preferences" else Counter[str]()
        self.labels, self.mixed = Labels(), ""
        self.names, self.contents = bytearray(), bytearray()
        self.lengths: dict[str, array[int]] = {}
        self.too_long, self.first_too_long = 0, ""
        self.spelled: Counter[str] = Counter()
        self.example: dict[str, tuple[Segment, ...]] = {}

    def readable(self, progress: Progress) -> Iterator[Any]:
        """Yield the rows that can be read, and take in what they and the others are."""
        for item in survey(self.use.source, self.use.purpose):
            progress(self.good + self.bad.count + 1)
            if item.error is not None:
                self.bad.add(str(item.error))
                continue
            if not self.good:
                self.layout = (item.format, item.columns)
            self.good += 1
            self._take(item.row)
            yield item.row

    def add(self, found: Measures) -> None:
        """Take in what the work on some rows has found."""
        for name, lengths in found.lengths.items():
            self.lengths.setdefault(name, array("i")).extend(lengths)
        self.contents += found.contents
        for refusal in found.refused:
            self.refused.add(refusal)
        self.too_long += len(found.too_long)
        self.first_too_long = self.first_too_long or next(iter(found.too_long), "")
        self.spelled.update(found.spelled)

    def described(self) -> Inspection:
        """Return the description of all rows."""
        made = Inspection(
            use=self.use,
            name=source_name(self.use.source),
            format=self.layout[0],
            columns=self.layout[1],
            rows=self.good + self.bad.count,
            bad=self.bad.count + self.refused.count,
            bad_rows=tuple([*self.bad.first, *self.refused.first][:SHOWN]),
            reasons=dict((self.bad.reasons + self.refused.reasons).most_common()),
            counts=dict(self.counts.most_common()) if self.use.purpose == "classes" else dict(self.counts),
            lengths={name: _summary(counts) for name, counts in self.lengths.items()},
            too_long=self.too_long,
            first_too_long=self.first_too_long,
            duplicates=_repeats(self.contents),
            spelled=dict(self.spelled.most_common()),
            example=self.example,
            refusals=(),
        )
        return replace(made, refusals=tuple(self._refusals(made)))

    def _take(self, row: Any) -> None:
        purpose = self.use.purpose
        if purpose == "preferences":
            self.counts.update({"pairs": len(row), "ties": not row})
        elif purpose == "labelled":
            self.counts.update("desirable" if item.desirable else "undesirable" for item in row)
        elif purpose == "classes":
            self.counts[str(row.label)] += 1
            self._label(row)
        elif purpose == "prompts":
            self.names += digest(row.id)
        if not self.example:
            with suppress(DataError):
                self.example = example_of(row, self.tokenizer)

    def _label(self, row: TextRow) -> None:
        try:
            self.labels.add(row)
        except DataError as error:
            self.mixed = self.mixed or str(error)

    def _refusals(self, made: Inspection) -> Iterator[str]:
        allowed = made.use.source.max_bad_rows
        if made.bad > allowed:
            yield f"{made.bad_rows[0]} ({made.bad} bad rows, max_bad_rows is {allowed})"
        if not self.good:
            yield f"{made.name}: no rows"
        if self.good and made.use.purpose == "preferences" and not made.counts["pairs"]:
            yield f"{made.name}: no pairs, as each of the {self.good} rows is a tie"
        if self.good and made.use.purpose == "classes":
            yield from self._class_refusals()
        if made.too_long:
            yield f"{made.first_too_long}: over {made.use.setting} {made.use.limit}, as are {made.too_long} rows in all"
        if made.use.purpose == "prompts":
            yield from self._repeated_ids()

    def _class_refusals(self) -> Iterator[str]:
        if self.mixed:
            yield self.mixed
            return
        try:
            self.labels.classes()
        except DataError as error:
            yield str(error)

    def _repeated_ids(self) -> Iterator[str]:
        numbers = group_numbers(_digests(self.names))
        often = np.bincount(numbers)
        twice = np.flatnonzero(often[numbers] > 1)
        if len(twice):
            good = (item.row for item in survey(self.use.source, self.use.purpose) if item.error is None)
            row = next(islice(good, int(twice[0]), None))
            yield f"{row.where}: prompt id {row.id!r} is used {often[numbers[twice[0]]]} times"


class Refused:
    """Rows that cannot be used: how many, the first of them, and how many for each of the first reasons."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []
        self.reasons: Counter[str] = Counter()

    def add(self, error: str) -> None:
        """Count an error, which begins with its place."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(error)
        reason = error.partition(": ")[2] or error
        self.reasons[reason if reason in self.reasons or len(self.reasons) < REASONS else OTHERS] += 1


def _summary(counts: array[int]) -> Lengths:
    ranked = np.sort(np.frombuffer(counts, np.intc))
    at = {share: int(ranked[math.ceil(share * len(ranked)) - 1]) for share in (0.5, 0.95)}
    return Lengths(int(ranked[0]), at[0.5], at[0.95], int(ranked[-1]))


def _repeats(contents: bytearray) -> int:
    numbers = group_numbers(_digests(contents))
    return len(numbers) - int(numbers.max(initial=-1)) - 1


def _digests(joined: bytearray) -> np.ndarray:
    return np.frombuffer(bytes(joined), np.uint64).reshape(-1, 2)
