"""Injects faults of every kind, counts what they did, and prints a table: `make chaos`, or `python -m tests.chaos`.

Each row is a module of this folder with `NAME`, `COUNT` and `run(count, random) -> Row`, and runs alone with
`python -m tests.chaos.<module> [--count N] [--seed N]`. Two rows run at a time where there are two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tests.chaos
from tests.chaos.row import Row, measure

LONGEST = ("interrupts", "faults", "resume", "run_files")
"""These begin first, so that the end does not wait for one of them."""


def main() -> None:
    """Run all rows, or those named, and exit with 1 when one missed its aim."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [module.name for module in pkgutil.iter_modules(tests.chaos.__path__)]
    known = [name for name in names if name not in ("row", "__main__") and not name.startswith(("test_", "_"))]
    arguments.add_argument("rows", nargs="*", choices=[[], *known], default=[], metavar="ROW", help=", ".join(known))
    arguments.add_argument("--share", type=float, default=1.0, help="inject only this share of the faults")
    arguments.add_argument("--seed", type=int, default=17)
    cores = min(2, len(os.sched_getaffinity(0)))
    arguments.add_argument("--jobs", type=int, default=cores, help="so many rows at a time")
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    table = Table("fault", "aim", "seen", "s", title=f"seed {options.seed}")
    rows: list[Row] = []
    names = sorted(options.rows or known, key=lambda name: name not in LONGEST)
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}  # rows are told, and nothing else
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(measure, name, options.share, options.seed) for name in names]):
            row, seconds = done.result()
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
            seen = ", ".join(f"{count} {what}" for what, count in row.counts.items())
            table.add_row(row.name, row.aim, seen if row.passed else f"[red]{seen}", f"{seconds:.0f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
