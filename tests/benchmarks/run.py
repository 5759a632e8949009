"""Runs every benchmark in this folder, one after another, each in a process of its own, and gathers their figures.

    python -m tests.benchmarks.run [--only ray_overhead ...] [--json out.json]

Each benchmark prints its table and writes JSON where `--json` says; the whole is one object, by benchmark. Timings are
rough on a machine that others use too.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.benchmarks._figures import command_line, give

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


def benchmarks() -> list[str]:
    """Return the names of the benchmarks in this folder."""
    return sorted(file.stem for file in FOLDER.glob("[a-z]*.py") if file != Path(__file__))


def figures(name: str) -> Any:
    """Run one benchmark and return what it wrote; None when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        ended = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}", "--json", str(out)], cwd=ROOT)
        return json.loads(out.read_text()) if ended.returncode == 0 else None


def main() -> None:
    """Run them all, print or write the figures, and exit with 1 when one of them failed."""
    arguments = command_line(__doc__)
    arguments.add_argument("--only", nargs="+", default=benchmarks(), choices=benchmarks(), metavar="NAME")
    options = arguments.parse_args()
    results: dict[str, Any] = {"machine": {"platform": platform.platform(), "cpus": os.cpu_count()}}
    for name in options.only:
        print(f"== {name}", flush=True)
        results[name] = figures(name)
    give(results, options.json)
    failed = [name for name in options.only if results[name] is None]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
