"""`rlhf cache`: what is kept in the user's cache, how large it is, and its removal."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rlhf.command import reports_errors
from rlhf.untrusted import echo

if TYPE_CHECKING:
    from rlhf.pruning import Entry

SECONDS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
BYTES = {"": 1, "B": 1}
BYTES |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
BYTES |= {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
DEFAULT_AGE = "30d"


class Amount(click.ParamType[float]):
    """A number with a unit, such as 30d or 20GiB."""

    def __init__(self, name: str, units: dict[str, Any]) -> None:
        self.name = name
        self.units = {unit.lower(): size for unit, size in units.items()}
        self.examples = ", ".join(f"1{unit}" for unit in units if unit not in ("", "B"))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number of seconds or bytes."""
        if isinstance(value, int | float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
        if found is None or found[2] not in self.units:
            self.fail(f"{value!r} is not a number with a unit: {self.examples}", param, ctx)
        return float(found[1]) * self.units[found[2]]


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@reports_errors
def cache(as_json: bool) -> None:
    """List what is kept between runs: converted models, tokenised data, reference log-probabilities, verdicts."""
    if click.get_current_context().invoked_subcommand is not None:
        return
    import json
    from dataclasses import asdict

    from rlhf.cache import default_cache
    from rlhf.pruning import entries

    found = entries(default_cache())
    if as_json:
        echo(json.dumps([asdict(entry) | {"path": str(entry.path)} for entry in found], indent=2))
        return
    _show(default_cache(), found)


@cache.command()
@click.option(
    "--older-than", type=Amount("age", SECONDS), help=f"Not used for so long: 12h, 30d, 8w.  [default: {DEFAULT_AGE}]"
)
@click.option("--max-size", type=Amount("size", BYTES), help="Of the rest, the least recently used beyond this: 20GiB.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@reports_errors
def prune(older_than: float | None, max_size: float | None, yes: bool) -> None:
    """Remove what no running process uses, the least recently used first; it is made again when it is needed.

    Without --older-than and --max-size, what was not used for 30 days. Verdicts of judges always stay.
    """
    import time

    from rlhf.amounts import size
    from rlhf.cache import default_cache
    from rlhf.errors import RecipeError
    from rlhf.pruning import entries, remove, superfluous, sweep

    if older_than is None and max_size is None:
        older_than = Amount("age", SECONDS).convert(DEFAULT_AGE, None, None)
    swept = sweep(default_cache())
    if swept:
        echo(f"removed {len(swept)} temporary files of processes that have ended")
    bound = None if max_size is None else int(max_size)
    doomed = superfluous(entries(default_cache()), older_than, bound, time.time())
    if not doomed:
        echo(f"nothing to remove in {default_cache()}")
        return
    _show(default_cache(), doomed)
    if not yes:
        if not sys.stdin.isatty():
            raise RecipeError("nothing is removed: this is no terminal, so give --yes to remove what is listed")
        click.confirm("remove these", abort=True)
    gone = [entry for entry in doomed if remove(entry)]
    kept = len(doomed) - len(gone)
    meanwhile = f"; {kept} came into use meanwhile and stay" if kept else ""
    echo(f"removed {len(gone)} entries, {size(sum(entry.size for entry in gone))}{meanwhile}")


def _show(folder: Path, found: list[Entry]) -> None:
    """Print entries as a table, with the size of each kind and of all."""
    import time
    from collections import Counter

    from rich import box
    from rich.text import Text

    from rlhf.amounts import duration, size
    from rlhf.tables import WholeTable
    from rlhf.terminal import Terminal

    console = Terminal()
    if not found:
        console.print(f"the cache {folder} is empty", soft_wrap=True)
        return
    table = WholeTable("kind", "name", "size", "last used", "", box=box.SIMPLE_HEAD, pad_edge=False)
    now = time.time()
    sizes: Counter[str] = Counter()
    for entry in found:
        sizes[entry.kind] += entry.size
        age = f"{duration(max(0.0, now - entry.used))} ago"
        cells = (entry.kind, entry.path.name, size(entry.size), age, "in use" if entry.in_use else "")
        table.add_row(*map(Text, cells))
    console.print(table)
    kinds = ", ".join(f"{kind} {size(count)}" for kind, count in sizes.items())
    total = f"{size(sum(sizes.values()))} in {folder}: {kinds}"
    console.print(total, soft_wrap=True)
