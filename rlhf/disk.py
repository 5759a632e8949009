"""What a disk refuses, through whichever library it comes, told with what helps."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.errors import ResourceError, RlhfError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
OS_ERROR = re.compile(r"(?:\(os error |\[Errno )(\d+)")  # how safetensors says it, and an error from another process
TORCH_WRITE = re.compile(r"inline_container|failed writing file")  # how torch.save does, without the cause


@contextmanager
def failures_told(path: Path, what: str) -> Iterator[None]:
    """Turn every OSError inside, and what libraries make of one, into a ResourceError that begins with the path."""
    try:
        yield
    except (RlhfError, ConnectionError):
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) and error.errno is not None else refusal(error)
        if code is None:
            raise
        raise told(error, code, path, what) from error


def refusal(error: Exception) -> int | None:
    """Return the number of the error by which a disk refused something; None for any other error."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in REFUSALS else None
    named = OS_ERROR.search(str(error))
    if named and int(named[1]) in REFUSALS:
        return int(named[1])
    return errno.ENOSPC if TORCH_WRITE.search(str(error)) else None


def told(error: Exception, code: int, path: Path, what: str) -> ResourceError:
    """Return the error for people: where it was, what could not be done, why, and what helps."""
    at = getattr(error, "filename", None) or path
    return ResourceError(f"{at}: {what}: {os.strerror(code)}; {_remedy(code)}; no older state is touched")


def _remedy(code: int) -> str:
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make the folder writable, or put the run elsewhere with --output"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space, lower recovery.keep_last, or put the run elsewhere with --output"
    return "check the disk, or put the run elsewhere with --output"
