"""`rlhf runs`: the run folders below a folder, and what differs between their recipes."""

from __future__ import annotations

from pathlib import Path

import click

from rlhf.command import reports_errors
from rlhf.untrusted import echo

WIDTH = 110


@click.command()
@click.argument("folder", default="runs", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@reports_errors
def runs(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (runs, unless named): when, how far, who won, and what differs in their recipes."""
    import json
    from dataclasses import asdict

    from rlhf.report.listing import list_runs, render_runs
    from rlhf.terminal import Terminal

    found = list_runs(folder)
    if as_json:
        echo(json.dumps(asdict(found), indent=2))
        return
    console = Terminal()
    console.width = max(console.width, WIDTH)
    console.print(render_runs(found))
