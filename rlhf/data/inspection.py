"""What stands in the data of a recipe, or in one file, before any of it is trained on."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rlhf.data.reading import Purpose, purpose_of, survey
from rlhf.data.rows import Conversation, Message, PreferenceRow, PromptRow
from rlhf.data.sequences import TokenSequence
from rlhf.data.tokenize import conversation_sequences, labelled_sequences, preference_sequences, tokenize_prompts
from rlhf.errors import DataError
from rlhf.recipe.base import HubData, PathData
from rlhf.recipe.preference_schema import KtoStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import SftStage, Stage

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer

SHOWN = 5
Segment = tuple[str, bool]


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
    lengths     tokens by part of a row, with the chat template; empty without a tokenizer
    too_long    rows over the limit of `use`, and `first_too_long` the first of them: they stop a run
    duplicates  rows that repeat an earlier one
    example     the first row by part, as (text, whether it is trained on); with the template where there is a tokenizer
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
    lengths: Mapping[str, Lengths]
    too_long: int
    first_too_long: str
    duplicates: int
    example: Mapping[str, tuple[Segment, ...]]
    refusals: tuple[str, ...]


def inspect_source(use: Use, tokenizer: ChatTokenizer | None) -> Inspection:
    """Read a whole source and describe it; DataError when there is no such file or dataset."""
    found = survey(use.source, use.purpose)
    bad = list(found.bad)
    lengths: dict[str, list[int]] = {}
    too_long: list[str] = []
    example: dict[str, tuple[Segment, ...]] = {}
    for row in found.rows:
        try:
            parts = _parts(row, use.purpose, tokenizer) if tokenizer else {}
        except DataError as error:
            bad.append(error)
            continue
        for name, sequence in parts.items():
            lengths.setdefault(name, []).append(len(sequence.tokens))
            if use.purpose != "prompts":
                lengths.setdefault(f"{name}, trained", []).append(sum(sequence.response_mask))
        if use.limit is not None and any(len(part.tokens) > use.limit for part in parts.values()):
            too_long.append(_where(row))
        if not example:
            example = {name: _segments(part, tokenizer) for name, part in parts.items()} if tokenizer else _plain(row)
    contents = [_content(row) for row in found.rows]
    made = Inspection(
        use=use,
        name=str(use.source.path) if isinstance(use.source, PathData) else f"{use.source.hub}[{use.source.split}]",
        format=found.format,
        columns=found.columns,
        rows=len(found.rows) + len(found.bad),
        bad=len(bad),
        bad_rows=tuple(str(error) for error in bad[:SHOWN]),
        reasons=dict(Counter(_reason(error) for error in bad).most_common()),
        lengths={name: _summary(counts) for name, counts in lengths.items()},
        too_long=len(too_long),
        first_too_long=too_long[0] if too_long else "",
        duplicates=len(contents) - len(set(contents)),
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
    for key, setting in (("data", "max_length"), ("prompts", "max_prompt_tokens")):
        source = getattr(stage, key, None)
        if isinstance(source, PathData | HubData):
            kind: Purpose = "prompts" if key == "prompts" else purpose
            yield Use(source, kind, (f"stages.{stage.name}.{key}",), setting, getattr(stage, setting))


def _parts(row: Any, purpose: Purpose, tokenizer: ChatTokenizer) -> dict[str, TokenSequence]:
    """Return the token sequences that training would make of a row, without a limit."""
    if purpose == "conversations":
        return {"conversation": conversation_sequences([row], tokenizer, sys.maxsize)[0]}
    if purpose == "prompts":
        tokens = tokenize_prompts([row], tokenizer, sys.maxsize)[0].tokens
        return {"prompt": TokenSequence(tokens, (False,) * len(tokens))}
    if purpose == "preferences":
        pair = preference_sequences([row], tokenizer, sys.maxsize)[0]
        return {"prompt + chosen": pair.chosen, "prompt + rejected": pair.rejected}
    found = labelled_sequences(row, tokenizer, sys.maxsize)
    return {f"prompt + {_label(item.desirable)} completion": item.sequence for item in found}


def _label(desirable: bool) -> str:
    return "desirable" if desirable else "undesirable"


def _segments(part: TokenSequence, tokenizer: ChatTokenizer) -> tuple[Segment, ...]:
    """Return the text of a sequence, special tokens and all, cut where training starts and ends."""
    marked = zip(part.tokens, part.response_mask, strict=True)
    return tuple(
        (tokenizer.hf.decode([token for token, _ in run], clean_up_tokenization_spaces=False), trained)
        for trained, run in groupby(marked, key=lambda item: item[1])
    )


def _plain(row: Any) -> dict[str, tuple[Segment, ...]]:
    """Return what the segments would be, without a template."""
    if isinstance(row, PromptRow):
        return {"prompt": tuple((_line(message), False) for message in row.messages)}
    if isinstance(row, Conversation):
        turns = ((_line(message), message["role"] == "assistant") for message in row.messages)
        return {"conversation": tuple(turns)}
    if isinstance(row, PreferenceRow):
        answers = {"prompt + chosen": row.chosen, "prompt + rejected": row.rejected}
    else:
        answers = {f"prompt + {_label(item.desirable)} completion": item.completion for item in row}
        row = row[0]
    asked = tuple((_line(message), False) for message in row.prompt)
    return {name: (*asked, ("assistant: ", False), (text, True)) for name, text in answers.items()}


def _line(message: Message) -> str:
    return f"{message['role']}: {message['content']}\n"


def _where(row: Any) -> str:
    return row[0].where if isinstance(row, tuple) else row.where


def _content(row: Any) -> str:
    """Return a row without its place and its name, to find it again."""
    items = [asdict(item) for item in (row if isinstance(row, tuple) else (row,))]
    return json.dumps([{key: item[key] for key in item if key not in ("where", "id")} for item in items], default=str)


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
    if made.too_long:
        yield f"{made.first_too_long}: over {made.use.setting} {made.use.limit}, as are {made.too_long} rows in all"
    if made.use.purpose == "prompts":
        names = Counter(row.id for row in rows)
        twice = next((row for row in rows if names[row.id] > 1), None)
        if twice:
            yield f"{twice.where}: prompt id {twice.id!r} is used {names[twice.id]} times"
