"""`rlhf status`: how far a run is."""

from __future__ import annotations

from pathlib import Path

import click

from rlhf.command import reports_errors
from rlhf.untrusted import echo

WIDTH = 110


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@reports_errors
def status(run: Path, as_json: bool) -> None:
    """Show how far the run in the folder RUN is, while it goes on or after it: stages, steps, time, saved states."""
    import json
    from dataclasses import asdict

    from rlhf.report.status import read_status, render_status
    from rlhf.terminal import Terminal

    found = read_status(run)
    if as_json:
        echo(json.dumps(asdict(found), indent=2))
        return
    console = Terminal()
    console.width = max(console.width, WIDTH)
    console.print(render_status(found))
