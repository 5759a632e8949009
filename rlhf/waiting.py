"""Says on a terminal what a command is busy with, while it imports and loads and has nothing else to show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a line on the error stream with a sign of life until the block ends; nothing where that is no terminal."""
    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    from rlhf.terminal import Terminal

    console = Terminal(stderr=True)
    if not console.is_terminal:
        yield
        return
    shown = Spinner("dots", Text(text))
    with Live(shown, console=console, transient=True, redirect_stdout=False, redirect_stderr=False):
        yield
