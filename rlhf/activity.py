"""Whether a process works that says nothing: what it and its children read, write and hold in memory."""

from __future__ import annotations

from contextlib import suppress

import psutil

UNIT = 2**24
"""Bytes; less is not taken for work, as an idle process also writes a line of its log now and then."""


def activity(pid: int | None = None) -> tuple[int, ...]:
    """Return bytes read, written and held by a process (this one by default) and its children, in units of `UNIT`.

    Two samples that differ say that the process has loaded, written or computed something in between; equal ones say
    nothing moved. A process that has ended counts as nothing.
    """
    sums = [0, 0, 0]
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                moved = one.io_counters()
                sums[0] += moved.read_chars
                sums[1] += moved.write_chars
                sums[2] += one.memory_info().rss
    return tuple(total // UNIT for total in sums)
