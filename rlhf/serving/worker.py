"""The process of vLLM's server: it ends when the one that started it does, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

STARTED_BY = "RLHF_SERVE_PARENT"
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run `vllm serve` with the arguments of this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[STARTED_BY]):
        return  # it ended before the line above
    from vllm.entrypoints.cli.main import main as vllm

    sys.argv = ["vllm", "serve", *sys.argv[1:]]
    vllm()


if __name__ == "__main__":
    main()
