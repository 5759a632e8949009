"""What stands in the data of a recipe, or in one file, before any of it is trained on."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from rlhf.data.classes import Labels
from rlhf.data.parts import Segment, example_of, items, parts, spelled
from rlhf.data.reading import Purpose, purpose_of, survey
from rlhf.data.recognise import source_name
from rlhf.data.rows import TextRow
from rlhf.errors import DataError
from rlhf.recipe.base import HubData, PathData
from rlhf.recipe.preference_schema import KtoStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import ClassifyStage, SftStage, Stage

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer

SHOWN = 5


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


def inspect_source(use: Use, tokenizer: ChatTokenizer | None) -> Inspection:
    """Read a whole source and describe it; DataError when there is no such file or dataset."""
    found = survey(use.source, use.purpose)
    bad = list(found.bad)
    lengths: dict[str, list[int]] = {}
    too_long: list[str] = []
    controls: Counter[str] = Counter()
    example: dict[str, tuple[Segment, ...]] = {}
    for row in found.rows:
        try:
            found_parts = [part for item in items(row) for part in parts(item, tokenizer)] if tokenizer else []
        except DataError as error:
            bad.append(error)
            continue
        controls.update(spelled(row, tokenizer) if tokenizer else ())
        for name, sequence in found_parts:
            lengths.setdefault(name, []).append(len(sequence.tokens))
            if any(sequence.response_mask):
                lengths.setdefault(f"{name}, trained", []).append(sum(sequence.response_mask))
        if use.limit is not None and any(len(part.tokens) > use.limit for _, part in found_parts):
            too_long.append(items(row)[0].where)
        example = example or example_of(row, tokenizer)
    contents = [_content(row) for row in found.rows if items(row)]
    made = Inspection(
        use=use,
        name=source_name(use.source),
        format=found.format,
        columns=found.columns,
        rows=len(found.rows) + len(found.bad),
        bad=len(bad),
        bad_rows=tuple(str(error) for error in bad[:SHOWN]),
        reasons=dict(Counter(_reason(error) for error in bad).most_common()),
        counts=_counts(found.rows, use.purpose),
        lengths={name: _summary(counts) for name, counts in lengths.items()},
        too_long=len(too_long),
        first_too_long=too_long[0] if too_long else "",
        duplicates=len(contents) - len(set(contents)),
        spelled=dict(controls.most_common()),
        example=example,
        refusals=(),
    )
    return replace(made, refusals=tuple(_refusals(made, found.rows)))


def inspect_recipe(recipe: Recipe, tokenizer: ChatTokenizer | None) -> list[Inspection]:
    """Describe every file and dataset that a recipe reads, each once per purpose and limit."""
    return [inspect_source(use, tokenizer) for use in uses(recipe)]


def inspect_file(source: PathData, tokenizer: ChatTokenizer | None) -> Inspection:
    """Describe one file, for what its format or columns say it is for."""
    return inspect_source(Use(source, purpose_of(source)), tokenizer)


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


def _counts(rows: Sequence[Any], purpose: Purpose) -> dict[str, int]:
    single = list(chain.from_iterable(map(items, rows)))
    if purpose == "preferences":
        return {"pairs": len(single), "ties": sum(not row for row in rows)}
    if purpose == "labelled":
        return dict(Counter("desirable" if item.desirable else "undesirable" for item in single))
    if purpose == "classes":
        return dict(Counter(str(item.label) for item in single).most_common())
    return {}


def _content(row: Any) -> str:
    """Return a row without its place and its name, to find it again."""
    said = [asdict(item) for item in items(row)]
    return json.dumps([{key: item[key] for key in item if key not in ("where", "id")} for item in said], default=str)


def _reason(error: DataError) -> str:
    """Return what is wrong with a row, without its place."""
    _, _, rest = str(error).partition(": ")
    return rest or str(error)


def _summary(counts: Sequence[int]) -> Lengths:
    ranked = sorted(counts)
    at = {share: ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.95)}
    return Lengths(ranked[0], at[0.5], at[0.95], ranked[-1])


def _refusals(made: Inspection, rows: Sequence[Any]) -> Iterator[str]:
    allowed = made.use.source.max_bad_rows
    if made.bad > allowed:
        yield f"{made.bad_rows[0]} ({made.bad} bad rows, max_bad_rows is {allowed})"
    if not rows:
        yield f"{made.name}: no rows"
    if rows and made.use.purpose == "preferences" and not made.counts["pairs"]:
        yield f"{made.name}: no pairs, as each of the {len(rows)} rows is a tie"
    if rows and made.use.purpose == "classes":
        yield from _class_refusals(rows)
    if made.too_long:
        yield f"{made.first_too_long}: over {made.use.setting} {made.use.limit}, as are {made.too_long} rows in all"
    if made.use.purpose == "prompts":
        names = Counter(row.id for row in rows)
        twice = next((row for row in rows if names[row.id] > 1), None)
        if twice:
            yield f"{twice.where}: prompt id {twice.id!r} is used {names[twice.id]} times"


def _class_refusals(rows: Sequence[TextRow]) -> Iterator[str]:
    labels = Labels()
    try:
        for row in rows:
            labels.add(row)
        labels.classes()
    except DataError as error:
        yield str(error)
