"""The body of `rlhf bench`: measure, print, write, and say by the exit code whether there was anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.text import Text

from rlhf.bench.measure import Cluster, Options, measure
from rlhf.bench.table import print_table
from rlhf.errors import ResourceError
from rlhf.terminal import Terminal
from rlhf.untrusted import printable

NARROW, WIDTH = 100, 140


def bench(options: Options, cluster: Cluster, output: Path | None) -> int:
    """Measure with progress on a terminal, print the table, write JSON to a file; return the exit code.

    It is 0, or that of ResourceError when nothing could be measured.
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise ResourceError(f"--json: there is no folder {output.absolute().parent}")
    with _progress() as say:
        result = measure(options, cluster, say)
    console = Terminal()
    if console.width < NARROW or not console.is_terminal:
        console.width = WIDTH
    print_table(result, console)
    if output is not None:
        output.write_text(result.to_json() + "\n", encoding="utf-8")
    return 0 if result.measured else ResourceError.exit_code


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being measured; nothing otherwise."""
    console = Terminal(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("starting") as status:
        yield lambda text: status.update(Text(printable(text)))
