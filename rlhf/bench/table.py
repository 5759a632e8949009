"""The figures as a person reads them in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.bench.figures import BenchResult, Figure
from rlhf.untrusted import visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

REASON_CHARACTERS = 300


def print_table(result: BenchResult, console: Console) -> None:
    """Print what was measured, and after it a line for each figure that could not be."""
    console.print(_headline(result), markup=False, highlight=False, soft_wrap=True)
    console.print(figures_table([figure for figure in result.figures if figure.value is not None]))
    for figure in result.figures:
        if figure.value is None:
            said = f"{figure.kind.part} {figure.name}: not measured: {visible(figure.reason, REASON_CHARACTERS)}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)


def figures_table(figures: Sequence[Figure]) -> RenderableType:
    """Return a row for each figure: value, limit, share of it, and what a bad one means."""
    from rich import box
    from rich.text import Text

    from rlhf.tables import WholeTable

    table = WholeTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("part", "figure", "on"):
        table.add_column(column)
    for column in ("value", "limit", "share"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    table.add_column("if it is bad", style="dim")
    for figure in figures:
        kind = figure.kind
        said = (_number(figure.value), _number(figure.limit), _percent(figure.fraction), kind.unit)
        table.add_row(kind.part, figure.name, figure.on, *said, Text(kind.low))
    return table


def _headline(result: BenchResult) -> str:
    machine, settings = result.machine, result.settings
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    return (
        f"{visible(machine['cpu'])}, {machine['cores']} cores, {machine['memory_gib']} GiB, {gpus}; "
        f"model {visible(settings['model'])} in {settings['dtype']}"
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.{0 if fraction >= 0.1 else 1}f} %"
