"""Tables in narrow terminals: two different names never look the same."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

import rlhf
from rlhf.report.listing import Difference, ListedRun, Listing, render_runs
from rlhf.terminal import uncut

NAMES = ["runs-quickstart-with-a-long-name-1", "runs-quickstart-with-a-long-name-2", "runs-quickstart-with-another"]


def text(renderable, width):
    out = io.StringIO()
    Console(file=out, width=width).print(renderable)
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 60, 40])
def test_cells_and_headers_are_folded_and_never_cut(width):
    table = Table("candidate")
    for heading in (*NAMES, "gold reward", "KL to reference"):
        table.add_column(Text(heading))
    table.add_column("fixed", no_wrap=True)
    for name in NAMES:
        table.add_row(Text(name), *("0.63 [0.59, 0.68]" for _ in range(6)))
    shown = text(uncut(table), width)
    assert "…" not in shown
    for name in NAMES:
        assert shown.count(name[-1]) >= 2


@pytest.mark.parametrize("width", [80, 60])
def test_runs_with_nearly_equal_names_are_told_apart(width):
    runs = tuple(ListedRun(f"/r/{name}", "quickstart", "done", 0.0, 6, 6, {"ppo": 0.6, "dpo": 0.6}) for name in NAMES)
    values = {run.folder: str(number) for number, run in enumerate(runs)}
    shown = text(render_runs(Listing("/r", runs, (Difference("quickstart", "seed", values),))), width)
    assert "…" not in shown
    letters = "".join(shown.split())
    assert letters.count("1") >= 2
    assert letters.count("2") >= 2


def test_every_table_of_the_package_is_uncut():
    sources = [path.read_text() for path in Path(rlhf.__file__).parent.rglob("*.py")]
    made = [source for source in sources if "from rich.table import Table" in source and " = Table(" in source]
    assert len(made) > 5
    assert all("uncut(" in source or 'overflow="fold"' in source for source in made)
