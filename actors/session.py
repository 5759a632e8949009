"""The folder of a Ray that a run has started for itself: sockets, logs, spilled objects. It goes when the run ends."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

log = logging.getLogger("rlhf")
KEEP = "RLHF_KEEP_RAY_LOGS"
PREFIX, LOCK = "rlhf-ray-", ".lock"
LONGEST = 36
"""Characters of the folder's path: the sockets below it add 66, and the system takes 103."""

SETTLED_S = 60.0
ENDING_S = 10.0
"""Ray's processes write for a moment after they were told to end."""

SESSION = "session_[0-9]*"
HEADINGS = (":job_id:", ":actor_name:", ":task_name:")
FILES, LINES, TAIL = 12, 20, 64 << 10


class OwnSession:
    """Where one run's own Ray keeps its files; nothing on disk before `make`, and never for a cluster that is joined.

    The folder is locked while this process lives. A run that is killed cannot remove its own: the next one does.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.lock = -1

    def make(self) -> Path:
        """Make the folder, after those of runs that were killed are removed."""
        root = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
        _sweep(root)
        if len(str(root)) + len(PREFIX) + 9 > LONGEST:
            root = Path("/tmp")
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        self.lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        return self.folder

    def remove(self, failed: bool) -> None:
        """Remove the folder when Ray has ended; of a run that failed, the last lines of its logs go to `run.log` first.

        With RLHF_KEEP_RAY_LOGS in the environment it stays.
        """
        if self.folder is None:
            return
        folder, self.folder = self.folder, None
        if failed:
            _log_tails(folder)
        if os.environ.get(KEEP):
            log.warning("Ray's logs stay in %s, as %s says", folder, KEEP)
        else:
            _delete(folder)
        os.close(self.lock)


def _sweep(root: Path) -> None:
    """Remove the folders of this user's runs that were killed: nobody holds their locks any more."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):
            status = folder.lstat()
            if folder.is_symlink() or status.st_uid != os.getuid() or time.time() - status.st_mtime < SETTLED_S:
                continue
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _delete(folder: Path) -> None:
    ends = time.monotonic() + ENDING_S
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        if time.monotonic() > ends:
            log.warning("%s cannot be removed yet; the next run on this machine does it", folder)
            return
        time.sleep(0.05)


def _log_tails(folder: Path) -> None:
    """Copy the last lines of the newest logs that say anything to the run's log: workers' errors, and Ray's own."""
    for file in _newest([*folder.glob(f"{SESSION}/logs/*.err"), *folder.glob(f"{SESSION}/logs/raylet.out")]):
        with suppress(OSError), file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
            said = stream.read().decode("utf-8", "replace").splitlines()
            lines = [line for line in said if not line.startswith(HEADINGS)][-LINES:]
            if lines:
                log.info("the end of Ray's %s:\n%s", file.name, "\n".join(lines))


def _newest(files: list[Path]) -> list[Path]:
    found = []
    for file in files:
        with suppress(OSError):
            status = file.stat()
            found += [(status.st_mtime, file)] if status.st_size else []
    return [file for _, file in sorted(found)[-FILES:]]
