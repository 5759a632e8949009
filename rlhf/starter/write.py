"""Writes a starter recipe and the files beside it, and checks that the recipe is valid."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.reading import read_prompts
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.base import PathData
from rlhf.recipe.load import load_recipe
from rlhf.starter.choices import PLACEHOLDER, Choices
from rlhf.starter.split import Item, Split, read_items, split, write_rows

TEMPLATE = "recipe.yaml.jinja"
JUDGE = "judge.py"
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
CHARACTERS_PER_TOKEN = 2.5
PROMPTS_PER_STEP = 32


@dataclass(frozen=True)
class Files:
    """Where the stages read, as written in the recipe, and what is to be written for them by path."""

    data: str
    prompts: str
    heldout: str
    writes: Mapping[Path, Callable[[Path], object]]


def write_starter(recipe: Path, choices: Choices, force: bool) -> list[Path]:
    """Write the recipe and what it needs; return the files, the recipe last.

    Raises RecipeError, before anything is written, where one of them is there already and `force` is not given.
    """
    if not recipe.absolute().parent.is_dir():
        raise RecipeError(f"{recipe}: there is no folder {recipe.parent}")
    compared = "duel" in choices.stages
    items = read_items(choices.data, choices.purpose) if compared else []
    files = _files(recipe, choices, items)
    writes = {**files.writes, **({recipe.parent / JUDGE: _write_judge} if _needs_judge(choices) else {})}
    there = [str(path) for path in (*writes, recipe) if path.exists()]
    if there and not force:
        raise RecipeError(f"{', '.join(there)}: there already; --force overwrites")
    text = _render(choices, files, _sizes(choices, items))
    for path, write in writes.items():
        write(path)
    recipe.write_text(text, encoding="utf-8")
    load_recipe(recipe)
    return [*writes, recipe]


def _files(recipe: Path, choices: Choices, items: Sequence[Item]) -> Files:
    """Say what is cut from the data: nothing where the command line names it, or no stage reads it."""
    data, prompts, heldout = choices.data, choices.prompts, choices.heldout
    writes: dict[Path, Callable[[Path], object]] = {}
    if items:
        parts = _parts(choices, items)
        stem = recipe.with_suffix("")
        if heldout is None:
            heldout = stem.with_name(f"{stem.name}.heldout.jsonl")
            writes[heldout] = lambda path: write_rows(path, parts.heldout)
            if choices.purpose != "prompts":
                data = stem.with_name(f"{stem.name}.train.jsonl")
                writes[data] = lambda path: write_rows(path, parts.train)
        if prompts is None and {"pairs", "ppo"} & set(choices.stages):
            prompts = stem.with_name(f"{stem.name}.prompts.jsonl")
            writes[prompts] = lambda path: write_rows(path, parts.prompts)
    return Files(_named(data, recipe), _named(prompts, recipe), _named(heldout, recipe), writes)


def _parts(choices: Choices, items: Sequence[Item]) -> Split:
    """Split the data, and leave out of it the held-out prompts that the command line names."""
    if choices.heldout is None:
        parts = split(items)
    else:
        named = {row.text for row in read_prompts(PathData(path=choices.heldout, format="prompts"))}
        parts = split([item for item in items if not item.texts & named])
        whole = [*parts.prompts, *parts.heldout]
        parts = Split(parts.train, [{**row, "id": str(n)} for n, row in enumerate(whole, start=1)], [])
    if "pairs" in choices.stages or "sft" in choices.stages or choices.purpose == "preferences":
        enough = parts.prompts
        if not enough:
            raise DataError(f"{choices.data}: too few different prompts to hold some out for the comparison")
    return parts


def _needs_judge(choices: Choices) -> bool:
    return "duel" in choices.stages and choices.judge == PLACEHOLDER


def _write_judge(path: Path) -> None:
    path.write_text((Path(__file__).parent / JUDGE).read_text(encoding="utf-8"), encoding="utf-8")


def _named(path: Path | None, recipe: Path) -> str:
    """Return a path as the recipe writes it: relative to the recipe where that is shorter to read."""
    if path is None:
        return ""
    relative = os.path.relpath(path.absolute(), recipe.absolute().parent)
    return str(path.absolute()) if relative.startswith("../../..") else relative


def _sizes(choices: Choices, items: Sequence[Item]) -> dict[str, int]:
    """Estimate lengths in tokens from characters, and how many prompts a step can take."""
    asked = [sum(len(message["content"]) for message in item.prompt) for item in items]
    answers = [_answer(item.row) for item in items]
    prompts = len({item.prompt[-1]["content"] for item in items})
    prompt, response = _tokens(max(asked, default=0)), _tokens(max(answers, default=0)) if any(answers) else 256
    row = _tokens(max((a + b for a, b in zip(asked, answers, strict=True)), default=2048))
    return {
        "prompt_tokens": prompt,
        "response_tokens": response,
        "row_tokens": row,
        "pair_tokens": prompt + response if "pairs" in choices.stages else row,
        "prompts_per_step": max(1, min(PROMPTS_PER_STEP, round(0.9 * prompts))),
    }


def _answer(row: Mapping[str, Any]) -> int:
    """Return the characters of the longest answer in a row."""
    if "messages" in row:
        return max(len(message["content"]) for message in row["messages"] if message["role"] == "assistant")
    return max((len(row[name]) for name in ("chosen", "rejected", "completion") if name in row), default=0)


def _tokens(characters: int) -> int:
    """Return a round number of tokens that a text of so many characters is likely to stay below."""
    needed = characters / CHARACTERS_PER_TOKEN + 16
    return next((length for length in LENGTHS if length >= needed), LENGTHS[-1])


def _render(choices: Choices, files: Files, sizes: Mapping[str, int]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    made = environment.get_template(TEMPLATE).render(
        made=choices, stages=choices.stages, files=files, judge=choices.judge_section, **sizes
    )
    return re.sub(r"\n{3,}", "\n\n", made)
