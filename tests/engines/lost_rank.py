"""One rank of two: `lost_rank.py RANK FATE`. Rank 1 dies or sleeps after a first exchange, or comes never.

It says when it has its libraries, and begins when it is answered with a port: ranks meet within a short deadline, and a
port that was free a while ago may be taken.
"""

import os
import sys
import time

import torch
import torch.distributed as dist

from rlhf.engines import ranks
from rlhf.errors import TrainingError

DEADLINE_S = 8.0


def main() -> None:
    rank, fate = int(sys.argv[1]), sys.argv[2]
    print("ready", flush=True)
    port = int(sys.stdin.readline())
    if fate == "comes never":
        sys.exit(refused(port))
    for _ in range(2):  # the second time does nothing
        ranks.join(rank, 2, "127.0.0.1", port, DEADLINE_S)
    group = dist.new_group([0, 1])  # as libraries make them
    dist.all_reduce(torch.ones(1), group=group)
    if rank == 1:
        time.sleep(0.0 if fate == "dies" else 4 * DEADLINE_S)
        os._exit(0)
    started = time.monotonic()
    try:
        with ranks.exchanging("policy.train"):
            dist.all_reduce(torch.ones(1), group=group)
    except TrainingError as error:
        print(f"{time.monotonic() - started:.1f} {error}", flush=True)
    os._exit(0)


def refused(port: int) -> int:
    """Wait for a rank that never comes."""
    try:
        ranks.join(0, 2, "127.0.0.1", port, 1.0)
    except TrainingError as error:
        print(error)
        return 0
    return 1


if __name__ == "__main__":
    main()
