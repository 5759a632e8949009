"""What all commands of `rlhf` share: how errors and interrupts end them, and how they take a recipe."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from rlhf import disk
from rlhf.allocator import kernels
from rlhf.errors import RecipeError, ResourceError, RlhfError
from rlhf.interrupts import COMMAND, Interrupted
from rlhf.untrusted import echo, printable

MAX_LINES = 6
LONGEST = 4000
INTERRUPTED = 130
UNEXPECTED = 1


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn an RlhfError into `error: ...` and its exit code, an interrupt into 130; add `--debug` for the traceback."""

    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapper(*, debug: bool, **arguments: Any) -> None:
        COMMAND.set()
        try:
            command(**arguments)
        except RlhfError as error:
            _show_traceback(debug)
            said = printable(str(error), LONGEST)  # it may quote data or a model
            lines = said.splitlines() or [type(error).__name__]
            _tell("error: " + "\n".join(lines[:MAX_LINES]))
            sys.exit(error.exit_code)
        except Interrupted as stop:
            at = f" in {stop}" if str(stop) else ""
            without = " without --restart" if arguments.get("restart") else ""
            _tell(f"interrupted{at}; the same command{without} goes on")
            leave(stop.exit_code)
        except KeyboardInterrupt:
            echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            _show_traceback(debug)
            if code := disk.refusal(error):
                _tell(f"error: {printable(str(disk.told(error, code, Path.cwd(), 'cannot be written')), LONGEST)}")
                sys.exit(ResourceError.exit_code)
            said = printable(f"unexpected {type(error).__name__}: {error}", LONGEST)
            _tell(f"error: {said}; --debug shows the traceback")
            sys.exit(UNEXPECTED)

    return wrapper


def leave(code: int) -> NoReturn:
    """End the process now that all is saved and closed: libraries' threads, cut short, may crash it on its way out."""
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def _tell(text: str) -> None:
    """Print to the error stream; where that goes to a disk that takes no more, the exit code alone must tell."""
    try:
        echo(text, err=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (or the flush at the end would change the exit code)


def _show_traceback(wanted: bool) -> None:
    if wanted:
        echo(traceback.format_exc(), err=True)


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Add the arguments RECIPE and `--set`, and pass the loaded recipe on."""

    @click.argument("recipe", type=click.Path(path_type=Path))
    @click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: stages.ppo.steps=3")
    @reports_errors
    @functools.wraps(command)
    def wrapper(*, recipe: Path, overrides: tuple[str, ...], **arguments: Any) -> None:
        quiet_libraries()
        from rlhf.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides)
        try:
            command(loaded, **arguments)
        except RecipeError as error:
            raise RecipeError(loaded.located(str(error))) from error

    return wrapper


def quiet_libraries() -> None:
    """Set what libraries read when they are imported: our own progress alone, no notices, threads that yield."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # one progress display, ours
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a new score head is meant to be new
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # idle threads soon yield to other processes
    os.environ.update(kernels(os.environ))
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed prints that it chose so
