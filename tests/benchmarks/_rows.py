"""What grows with the data: rows of `tests.benchmarks.scale`, each measured at several sizes in a fresh process.

A row prepares its work for a size, and the work alone is timed. Its memory is the peak of the process beside what it
held before the work: libraries and what was prepared.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Work = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One kind of work: `prepare` makes what `size` of it need in a folder, and returns the work."""

    what: str
    unit: str
    sizes: tuple[int, ...]
    prepare: Callable[[int, Path], Work]


MODULES = tuple(f"tests.benchmarks.{name}" for name in ("_comparison", "_data", "_sampling", "_scores_states"))
"""Each has `ROWS`, by name."""


def rows() -> dict[str, Row]:
    """Return all rows by name."""
    found: dict[str, Row] = {}
    for module in MODULES:
        found |= import_module(module).ROWS
    return found


def measure(name: str, size: int) -> dict[str, Any]:
    """Measure one row at one size in a process of its own: seconds, CPU seconds, bytes beside what was there before."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks._rows", name, str(size)],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"row": name, "size": size, **found}


def show(measured: Sequence[dict[str, Any]]) -> None:
    """Print what was measured; `grows` is the exponent of the CPU time from the size before, 1 where it is linear."""
    table = Table(
        "row", "of", "size", "seconds", "CPU s", "grows", "GB beside", "GB in all", title="growth with the data"
    )
    before: dict[str, Any] = {}
    for found in measured:
        grows = ""
        if before and before["row"] == found["row"]:
            ratio = found["cpu_s"] / max(before["cpu_s"], 1e-9)
            grows = f"{math.log(ratio) / math.log(found['size'] / before['size']):.2f}"
        memory = (f"{found[key] / 1e9:.2f}" for key in ("grown_bytes", "peak_bytes"))
        row = rows()[found["row"]]
        table.add_row(
            row.what,
            row.unit,
            f"{found['size']:,}",
            *(f"{found[key]:.1f}" for key in ("seconds", "cpu_s")),
            grows,
            *memory,
        )
        before = found
    Console(width=130).print(table)


def main() -> None:
    """Measure here and now what the command line names, and print it as one line of JSON."""
    row, size = rows()[sys.argv[1]], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        work = row.prepare(size, Path(folder))
        held = _resident()
        began, used = time.perf_counter(), time.process_time()
        work()
        spent = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - used}
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**spent, "peak_bytes": peak, "grown_bytes": peak - held}))


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
