"""Which process runs, what it works on, and how it ended: `run.json` of the run folder, for `rlhf status`."""

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

    `running` may be said of a process that is gone: one that was killed says nothing. `stage` is the one that was
    worked on last, "" after a run that came to its end.
    """

    pid: int
    host: str
    began: float
    ended: float | None = None
    outcome: Outcome = "running"
    error: str = ""
    stage: str = ""


def read_record(folder: Path) -> RunRecord | None:
    """Return the record of a run folder, None where there is none that can be read."""
    try:
        return RunRecord(**json.loads((folder / RECORD).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


class Recorder:
    """Writes the record of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        earlier = read_record(folder)
        self.record = RunRecord(os.getpid(), socket.gethostname(), time.time(), stage=earlier.stage if earlier else "")
        _write(folder, self.record)

    def working_on(self, stage: str) -> None:
        """Say which stage is worked on from now on."""
        self.record.stage = stage
        _write(self.folder, self.record)

    def end(self, outcome: Outcome, error: str = "") -> None:
        """Say how the process ended."""
        self.record.outcome, self.record.error, self.record.ended = outcome, printable(error, LONGEST), time.time()
        self.record.stage = "" if outcome == "done" else self.record.stage
        _write(self.folder, self.record)


@contextmanager
def recorded(folder: Path) -> Iterator[Recorder]:
    """Keep the record of this process while it runs."""
    recorder = Recorder(folder)
    try:
        yield recorder
    except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
        recorder.end("interrupted", str(stop))
        raise
    except BaseException as error:
        recorder.end("failed", str(error) or type(error).__name__)
        raise
    else:
        recorder.end("done")


def _write(folder: Path, record: RunRecord) -> None:
    partial = folder / f"{RECORD}.partial"
    with suppress(OSError):  # on a full disk the run's own error is what matters
        partial.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / RECORD)
