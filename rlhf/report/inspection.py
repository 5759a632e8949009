"""What `rlhf data inspect` prints; everything from the file is made visible before it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console
from rich.text import Text

from rlhf.data.inspection import Inspection, inspect_file, inspect_recipe
from rlhf.data.parts import Segment
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.base import PathData
from rlhf.recipe.schema import ModelSource
from rlhf.terminal import Terminal
from rlhf.untrusted import echo, visible

if TYPE_CHECKING:
    from rlhf.models.tokenizer import ChatTokenizer

SHOWN, LABELS = 5, 20
SAID_EVERY = 1000
EXAMPLE_CHARACTERS = 1500


def inspect_and_print(path: Path, model: str | None, kind: str, as_json: bool) -> None:
    """Inspect a data file, or the data of a recipe (.yaml) with its own model's tokenizer, and print what was found.

    Raises DataError, after printing, when a run would stop at this data.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        from rlhf.data.disjoint import check_disjoint
        from rlhf.recipe.load import load_recipe

        recipe = load_recipe(path).recipe
        tokenizer = _tokenizer(ModelSource(path=model) if model else recipe.model)
        with _counting() as progress:
            made = inspect_recipe(recipe, tokenizer, progress)
    else:
        source, recipe = _file(path, kind), None
        with _counting() as progress:
            made = [inspect_file(source, _tokenizer(ModelSource(path=model)) if model else None, progress)]
    if as_json:
        echo(json.dumps([asdict(one) for one in made], indent=2, default=lambda source: source.model_dump(mode="json")))
    else:
        console = Terminal()
        for one in made:
            print_inspection(one, console)
        if not recipe and not model:
            console.print("give --model to count tokens, and rows that spell a control token", soft_wrap=True)
    if refusals := [refusal for one in made for refusal in one.refusals]:
        raise DataError(refusals[0] + (f" (and {len(refusals) - 1} more)" if refusals[1:] else ""))
    if recipe:
        check_disjoint(recipe)


@contextmanager
def _counting() -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many rows have been read, and nothing elsewhere."""
    console = Terminal(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("reading") as status:

        def progress(rows: int) -> None:
            if not rows % SAID_EVERY:
                status.update(Text(f"reading: {rows:,} rows"))

        yield progress


def _file(path: Path, kind: str) -> PathData:
    kinds: tuple[Any, ...] = get_args(PathData.model_fields["format"].annotation)
    if kind not in kinds:
        raise RecipeError(f"--format {kind}: must be one of {', '.join(kinds)}")
    return PathData(path=path, format=kind)


def _tokenizer(source: ModelSource) -> ChatTokenizer:
    from rlhf.models.loading import resolve_model
    from rlhf.models.tokenizer import load_tokenizer

    return load_tokenizer(resolve_model(source))


def print_inspection(made: Inspection, console: Console) -> None:
    """Print one source: what it is, what is wrong with it, how long its rows are, and one of them as it is trained on.

    Trained text is bold green on a terminal and in [[double brackets]] elsewhere.
    """
    console.print(Text(visible(made.name), style="bold"), soft_wrap=True)
    for name, value in _facts(made):
        console.print(Text(f"  {name:<12}") + Text(visible(value)), soft_wrap=True)
    for name, segments in made.example.items():
        trained = "" if made.use.purpose == "prompts" else " (bold: trained on)"
        console.print(
            Text(f"  first row, {name}{trained if console.is_terminal else trained.replace('bold', '[[ ]]')}")
        )
        console.print(_example(segments, console.is_terminal), soft_wrap=True)
    for refusal in made.refusals:
        console.print(Text("  would stop a run: ", style="red") + Text(visible(refusal)), soft_wrap=True)


def _facts(made: Inspection) -> Iterator[tuple[str, str]]:
    if made.use.keys:
        yield "read by", ", ".join(made.use.keys)
    yield "format", f"{made.format}, for {made.use.purpose}; columns {', '.join(made.columns) or 'unknown'}"
    yield "rows", f"{made.rows}, {made.bad} bad, {made.duplicates} that repeat an earlier one"
    for reason, count in list(made.reasons.items())[:SHOWN]:
        yield "", f"{count} x {reason}"
    for token, count in list(made.spelled.items())[:SHOWN]:
        yield "", f"{count} with {token} in a text, where it is encoded as its letters"
    if made.counts and made.use.purpose == "classes":
        shown = [f"{label} {count}" for label, count in list(made.counts.items())[:LABELS]]
        more = f" and {len(made.counts) - LABELS} more" if len(made.counts) > LABELS else ""
        yield "labels", f"{len(made.counts)}: {', '.join(shown)}{more}"
    elif made.counts:
        yield "", ", ".join(f"{count} {name}" for name, count in made.counts.items())
    for row in made.bad_rows:
        yield "bad row", row
    for name, lengths in made.lengths.items():
        numbers = f"min {lengths.min}, median {lengths.median}, p95 {lengths.p95}, max {lengths.max}"
        yield "tokens", f"{name}: {numbers}"
    if made.use.limit is not None and made.lengths:
        first = f", the first: {made.first_too_long}" if made.too_long else ""
        yield "too long", f"{made.too_long} over {made.use.setting} {made.use.limit}{first}"


def _example(segments: Sequence[Segment], colours: bool) -> Text:
    shown = Text("")
    for text, trained in segments:
        safe = visible(text, EXAMPLE_CHARACTERS)
        shown.append(safe if colours or not trained else f"[[{safe}]]", style="bold green" if trained else "dim")
    indented = Text("    | ")
    return indented + Text("\n    | ").join(shown.split("\n"))
