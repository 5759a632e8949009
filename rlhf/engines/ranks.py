"""Joining the processes that hold a model together, and saying which of their exchanges failed."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from rlhf.errors import LOST_RANK, TrainingError
from rlhf.pulse import PULSE

COLLECTIVES = "torch.distributed.distributed_c10d"
TRANSPORTS = ("gloo", "NCCL")
BACKLOG = 1024
LISTENING: dict[int, socket.socket] = {}
"""By port: what `listen` opened and `join` has not used yet."""


def listen(address: str) -> int:
    """Return a port of this machine's `address` at which the ranks can meet; it stays open until rank 0 joins here."""
    listening = _server(address, 0)
    port: int = listening.getsockname()[1]
    LISTENING[port] = listening
    return port


def join(rank: int, ranks: int, address: str, port: int, timeout_s: float) -> None:
    """Meet the other ranks at rank 0's `address` and `port`: NCCL on GPUs, gloo on CPU.

    `timeout_s` is the deadline of the meeting and of every collective from then on. Every process sees its own GPU
    only. The group lasts as long as the process; joining it again does nothing. Raises TrainingError when a rank does
    not come in time.
    """
    if dist.is_initialized():
        if position() != (rank, ranks):
            raise RuntimeError(f"this process is rank {position()} already, not {(rank, ranks)}")
        return
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _interface(address))
    deadline = timedelta(seconds=timeout_s)
    # Libraries make groups of their own, which would wait for half an hour.
    dist.distributed_c10d.default_pg_timeout = deadline
    dist.distributed_c10d.default_pg_nccl_timeout = deadline
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=_store(rank, ranks, address, port, deadline),
            rank=rank,
            world_size=ranks,
            timeout=deadline,
            device_id=torch.device("cuda", 0) if on_gpu and ranks > 1 else None,
        )
    except (dist.DistError, RuntimeError, OSError) as error:
        raise TrainingError(
            f"rank {rank} of {ranks}: the ranks did not meet at {address}:{port} within {timeout_s:g} s: {_line(error)}"
        ) from error


def _store(rank: int, ranks: int, address: str, port: int, deadline: timedelta) -> dist.TCPStore:
    """Meet at rank 0, which listens at `address` alone where torch itself would listen at all of the machine's."""
    if rank != 0:
        return dist.TCPStore(address, port, ranks, is_master=False, timeout=deadline)
    listening = LISTENING.pop(port, None) or _server(address, port)
    return dist.TCPStore(address, port, ranks, is_master=True, timeout=deadline, master_listen_fd=listening.detach())


def _server(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=BACKLOG)


def join_alone() -> None:
    """Make a group of this process, for what wants a group, unless it is in one."""
    if dist.is_initialized():
        return
    join(0, 1, "127.0.0.1", listen("127.0.0.1"), 60.0)


def position() -> tuple[int, int]:
    """Return this process's rank and how many there are; (0, 1) in no group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def exchanging(what: str) -> Iterator[None]:
    """Make the failure of a collective a TrainingError that names it, this rank, and `what` was going on."""
    PULSE.begin(what)
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        collective = _collective(error)
        if collective is None:
            raise
        rank, ranks = position()
        said = f"{LOST_RANK} in {collective}, which died or missed the deadline: {_line(error)}"
        raise TrainingError(f"{what}: rank {rank} of {ranks} {said}") from error


def _collective(error: BaseException) -> str | None:
    """Return the name of the collective that raised the error; None when it was something else."""
    names = [
        frame.f_code.co_name
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__") == COLLECTIVES
    ]
    public = [name for name in names if not name.startswith("_")]
    if public:
        return public[-1]
    return "a collective" if isinstance(error, dist.DistError) or any(t in str(error) for t in TRANSPORTS) else None


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _interface(address: str) -> str:
    """Return the name of the network interface that leads to an address, which gloo may not find by host name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 1))  # sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address == own for item in addresses):
            return name
    raise RuntimeError(f"no network interface has the address {own}")
