"""Injects faults of every kind, counts what they did, and prints a table: `make chaos`, or `python -m tests.chaos`.

Each row is a module of this folder with `NAME`, `COUNT` and `run(count, random) -> Row`, and runs alone with
`python -m tests.chaos.<module> [--count N] [--seed N]`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import tests.chaos


def main() -> None:
    """Run all rows, or those named, and exit with 1 when one missed its aim."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [module.name for module in pkgutil.iter_modules(tests.chaos.__path__)]
    known = [name for name in names if name not in ("row", "__main__") and not name.startswith(("test_", "_"))]
    arguments.add_argument("rows", nargs="*", choices=[[], *known], default=[], metavar="ROW", help=", ".join(known))
    arguments.add_argument("--share", type=float, default=1.0, help="inject only this share of the faults")
    arguments.add_argument("--seed", type=int, default=17)
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    table = Table("fault", "aim", "seen", "s", title=f"seed {options.seed}")
    rows = []
    for name in options.rows or known:
        module = importlib.import_module(f"tests.chaos.{name}")
        began = time.monotonic()
        row = module.run(max(1, round(module.COUNT * options.share)), random.Random(options.seed))
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        seen = ", ".join(f"{count} {what}" for what, count in row.counts.items())
        table.add_row(row.name, row.aim, seen if row.passed else f"[red]{seen}", f"{time.monotonic() - began:.0f}")
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
