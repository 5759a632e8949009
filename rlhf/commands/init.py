"""`rlhf init`: a commented recipe for one's own data, or an example with data of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlhf.command import quiet_libraries, reports_errors
from rlhf.errors import RecipeError
from rlhf.untrusted import echo

if TYPE_CHECKING:
    from rlhf.data.reading import Purpose
    from rlhf.starter.choices import Choices, Method

EXAMPLES = ("quickstart",)
METHODS: tuple[Method, ...] = ("sft", "dpo", "ppo", "both", "classify")


@click.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--example", type=click.Choice(EXAMPLES), help="Write this example to the folder FILE (its name).")
@click.option("--data", type=click.Path(path_type=Path), help="Chats, prompts, preference pairs or labelled texts.")
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts to answer in training; cut from the data.")
@click.option("--heldout", type=click.Path(path_type=Path), help="Prompts to compare on; cut from the data.")
@click.option("--model", help="A hub id, a folder, or gguf://package/file.gguf.")
@click.option("--method", type=click.Choice(METHODS), help="What to train; proposed from the data.")
@click.option("--gpus", type=int, help="GPUs to use; 0 is the CPU.")
@click.option("--judge", help="placeholder (a file to edit), file.py:function, http://..., llm:MODEL or llm:MODEL@URL.")
@click.option("--name", help="Names the run; the file's name otherwise.")
@click.option("--yes", "-y", is_flag=True, help="Ask nothing: take what is proposed.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@reports_errors
def init(
    file: Path | None,
    example: str | None,
    data: Path | None,
    prompts: Path | None,
    heldout: Path | None,
    model: str | None,
    method: str | None,
    gpus: int | None,
    judge: str | None,
    name: str | None,
    yes: bool,
    force: bool,
) -> None:
    """Write a commented recipe to FILE (recipe.yaml) for your data, and what it needs beside it.

    Asks on a terminal for what no option gives. The recipe is valid when this ends without an error. With --example,
    FILE is a folder, which gets a recipe with data and rewards of its own.
    """
    quiet_libraries()
    if example is not None:
        if any(given is not None for given in (data, prompts, heldout, model, method, gpus, judge, name)):
            raise RecipeError(f"--example {example} is complete: of the other options only --force goes with it")
        _write_example(example, file or Path(example), force)
        return
    file = file or Path("recipe.yaml")
    if file.is_dir():
        raise RecipeError(f"{file} is a folder: name the recipe to write, or --example")
    from rlhf.data.reading import purpose_of
    from rlhf.recipe.base import PathData
    from rlhf.starter.choices import USES, Choices, check
    from rlhf.starter.write import write_starter

    asks = sys.stdin.isatty() and not yes
    if data is None and asks:
        data = Path(click.prompt("Data file (jsonl, json, csv or parquet)"))
    if data is None:
        raise RecipeError("--data FILE: name the data to begin with; docs/pages/data.md says what it may hold")
    purpose: Purpose = purpose_of(PathData(path=data))
    fitting = USES[purpose]
    if asks:
        echo(f"{data} holds {purpose}; that serves {', '.join(fitting)}")
    chosen = method or _ask("Method", fitting[0], asks, METHODS)
    count = gpus if gpus is not None else int(_ask("GPUs (0: CPU)", str(_visible_gpus()), asks))
    choices = Choices(
        name=name or file.stem,
        data=data,
        purpose=purpose,
        method=next(known for known in METHODS if known == chosen),
        model=model or _ask("Model", _model(count), asks),
        gpus=count,
        judge=judge or (_ask("Judge", "placeholder", asks) if chosen in ("dpo", "ppo", "both") else "placeholder"),
        prompts=prompts,
        heldout=heldout,
    )
    check(choices)
    _tell(choices, write_starter(file, choices, force))


def _write_example(example: str, folder: Path, force: bool) -> None:
    from importlib.util import find_spec

    from rlhf.installing import MODEL_MODULE, model_command
    from rlhf.starter.example import write_example

    written = write_example(example, folder, force)
    for path in written:
        echo(f"wrote {path}")
    missing = f"{model_command()}; " if find_spec(MODEL_MODULE) is None else ""
    echo(f"next: {missing}rlhf run {written[0]}")


def _ask(question: str, proposed: str, asks: bool, answers: tuple[str, ...] | None = None) -> str:
    if not asks:
        return proposed
    return str(click.prompt(question, default=proposed, type=click.Choice(answers) if answers else str))


def _model(gpus: int) -> str:
    from rlhf.starter.choices import CPU_MODEL, GPU_MODEL

    return GPU_MODEL if gpus else CPU_MODEL


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _tell(choices: Choices, written: list[Path]) -> None:
    for path in written:
        echo(f"wrote {path}")
    recipe = written[-1]
    echo(f"OK {choices.name}: {' -> '.join(choices.stages)}")
    if any(path.name == "judge.py" for path in written):
        echo("judge.py is a placeholder: write into it what you want of an answer")
    echo(f"next: rlhf plan {recipe}; rlhf run {recipe}")
