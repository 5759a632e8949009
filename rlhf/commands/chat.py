"""`rlhf chat`: talk to stages."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from rlhf.command import quiet_libraries, reports_errors
from rlhf.untrusted import echo
from rlhf.waiting import waiting

if TYPE_CHECKING:
    from rlhf.serving.talk import Talker

MOST = 2


@click.command()
@click.argument("models", metavar="[RUN/STAGE [RUN/STAGE]]", nargs=-1)
@click.option("--url", help="Talk to a running `rlhf serve`; the names are those of its models then.")
@click.option("--api-key-env", metavar="VAR", help="The variable with that server's key.")
@click.option("--temperature", default=0.7, show_default=True, type=click.FloatRange(0, 5), help="0 is greedy.")
@click.option("--max-tokens", default=256, show_default=True, type=click.IntRange(1), help="Tokens of an answer.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of what is drawn.")
@reports_errors
def chat(
    models: tuple[str, ...], url: str | None, api_key_env: str | None, temperature: float, max_tokens: int, seed: int
) -> None:
    """Talk to one stage, or to two side by side; `/reset` begins anew, `/quit` ends.

    Reads standard input line by line where it is no terminal.
    """
    quiet_libraries()
    from rlhf.serving.chat import HELP, Chat
    from rlhf.serving.talk import Style
    from rlhf.terminal import Terminal

    with waiting(f"loading {', '.join(models)}" if models else "asking the server"):
        talkers = _talkers(models, url, api_key_env)
    conversation = Chat(talkers, Style(temperature, max_tokens, seed), Terminal())
    if sys.stdin.isatty():
        echo(f"{' | '.join(talker.name for talker in talkers)}: {HELP}")
    conversation.run(_typed() if sys.stdin.isatty() else sys.stdin)


def _talkers(models: tuple[str, ...], url: str | None, api_key_env: str | None) -> list[Talker]:
    from rlhf.commands.serve import read_key
    from rlhf.errors import RecipeError
    from rlhf.export.source import find_models
    from rlhf.serving.talk import LocalTalker, served_talkers

    if url is None and not models:
        raise RecipeError("name a stage, such as runs/quickstart/ppo, or give --url of a running `rlhf serve`")
    if len(models) > MOST:
        raise RecipeError(f"{len(models)} models: one, or two side by side")
    if url is not None:
        return [*served_talkers(url, models, read_key(api_key_env))[:MOST]]
    return [LocalTalker(model.name, model.folder) for model in find_models(models)]


def _typed() -> Iterator[str]:
    """Yield what is typed, until the end of the input."""
    import readline  # noqa: F401  (lines can be edited and called back)

    while True:
        try:
            yield input("> ")
        except EOFError:
            echo("")
            return
