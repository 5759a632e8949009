"""The logs of a run: `logs/run.log`, and `logs/rewards.log` with what reward functions print. Both are bounded."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import RotatingFileHandler
from pathlib import Path

from rlhf.untrusted import PrintableFormatter

RUN_LOG, REWARDS_LOG = "run.log", "rewards.log"
BYTES = 16 << 20
"""Size at which a log is renamed to `run.log.1` and a new one begins."""
OLDER = 3
"""So many renamed ones stay; the oldest is dropped."""

log = logging.getLogger("rlhf")
printed_log = log.getChild("printed")
"""Gets what reward functions print."""


class BoundedLog(RotatingFileHandler):
    """A log file that keeps the newest `(OLDER + 1) * BYTES`. `dropping`, if any, is warned once, when that begins."""

    def __init__(self, path: Path, form: str, dropping: str = "") -> None:
        super().__init__(path, maxBytes=BYTES, backupCount=OLDER, encoding="utf-8", delay=True)
        self.setFormatter(PrintableFormatter(form))
        self.dropping = dropping

    def doRollover(self) -> None:
        """Rename the files, and say when the oldest is lost."""
        drops = Path(f"{self.baseFilename}.{self.backupCount}").exists()
        super().doRollover()
        if drops and self.dropping:
            message, self.dropping = self.dropping, ""
            log.warning(message)

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a disk that takes no more: what the run cannot do without says so itself."""
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Write the logs of the run in `folder`."""
    (folder / "logs").mkdir(exist_ok=True)
    printed = folder / "logs" / REWARDS_LOG
    dropping = f"reward functions print much: {printed} keeps the newest {(OLDER + 1) * BYTES >> 20} MiB of it"
    with ExitStack() as stack:
        to_run = BoundedLog(folder / "logs" / RUN_LOG, "%(asctime)s %(levelname)s %(name)s: %(message)s")
        stack.enter_context(_attached(log, to_run))
        stack.enter_context(_attached(printed_log, BoundedLog(printed, "%(asctime)s %(message)s", dropping)))
        yield


@contextmanager
def _attached(logger: logging.Logger, handler: logging.Handler) -> Iterator[None]:
    """Have a logger write to a handler alone, from level INFO on."""
    before = logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before
        handler.close()
