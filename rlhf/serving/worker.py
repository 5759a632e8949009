"""The process of vLLM's server: it ends when the one that started it does, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal

from rlhf.media import hide_media

STARTED_BY = "RLHF_SERVE_PARENT"
PR_SET_PDEATHSIG = 1
hide_media()  # here, so that processes which vLLM starts do it too


def main() -> None:
    """Run vLLM's server with the arguments of this process."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ[STARTED_BY]):
        return  # it ended before the line above
    # Not the command `vllm`: it asks for a package of that name, and the build for CPUs has another one.
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    serve()


if __name__ == "__main__":
    main()
