"""Which process runs, and how it ended: `run.json` of the run folder, for who looks on."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rlhf.interrupts import Interrupted
from rlhf.untrusted import printable

RECORD = "run.json"
LONGEST = 2000
Outcome = Literal["running", "done", "interrupted", "failed"]


@dataclass
class RunRecord:
    """The last process that ran a folder; times are seconds since the epoch, and `error` is why it did not finish.

    `running` may be said of a process that is gone: one that was killed says nothing.
    """

    pid: int
    host: str
    began: float
    ended: float | None = None
    outcome: Outcome = "running"
    error: str = ""


def read_record(folder: Path) -> RunRecord | None:
    """Return the record of a run folder, None where there is none that can be read."""
    try:
        return RunRecord(**json.loads((folder / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Keep the record of this process while it runs."""
    record = RunRecord(os.getpid(), socket.gethostname(), time.time())
    _write(folder, record)
    try:
        yield
        record.outcome = "done"
    except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
        record.outcome, record.error = "interrupted", printable(str(stop), LONGEST)
        raise
    except BaseException as error:
        record.outcome, record.error = "failed", printable(str(error) or type(error).__name__, LONGEST)
        raise
    finally:
        record.ended = time.time()
        _write(folder, record)


def _write(folder: Path, record: RunRecord) -> None:
    partial = folder / f"{RECORD}.partial"
    with suppress(OSError):  # on a full disk the run's own error is what matters
        partial.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / RECORD)
