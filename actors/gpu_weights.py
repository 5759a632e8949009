"""Weights between GPUs, by vLLM's own senders: NCCL to engines on GPUs of their own, CUDA IPC to the policy's.

Every rank of the policy has a sender. With NCCL rank 0 alone sends, bucket by bucket, and the others take part in
gathering; with IPC every rank packs what it gathered into memory of its own GPU, and an engine reads from the rank on
its own GPU, so tensors never leave a device.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import ray
import torch

from actors.replicas import ReplicaClient
from rlhf.engines.shared_memory import Weights
from rlhf.errors import RecipeError, TrainingError

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer import TrainerWeightTransferEngine

POLL_S = 0.2


class GpuSender:
    """One rank's connection to a set of replicas."""

    def __init__(self, client: ReplicaClient, weights: Callable[[], Weights], rank: int) -> None:
        """Connect, which every rank must do; for IPC this takes one pass over the weights.

        Raises:
            RecipeError: the policy has no GPU.
        """
        if not torch.cuda.is_available():
            raise RecipeError(
                "roles.rollout has GPUs and roles.policy has none: give the policy one, or the rollout none"
            )
        self.engine: TrainerWeightTransferEngine
        start = _ipc if client.transports[0].backend == "ipc" else _nccl

        def connect() -> None:
            self.engine = start(client, weights, rank)

        bounded(connect, client)

    def send(self, client: ReplicaClient, weights: Callable[[], Weights]) -> None:
        """Send a fresh pass of the weights and let the replicas put them in place; every rank calls this."""
        from rlhf.engines.vllm_transfer import ReplayedSource

        self.engine.client = client
        self.engine.source = ReplayedSource(weights)
        bounded(self.engine.send_weights, client)

    def abandon(self) -> None:
        """Leave a connection whose other end may be dead; vLLM ends it in a thread of its own."""
        self.engine.shutdown()


def bounded(work: Callable[[], None], client: ReplicaClient) -> None:
    """Run a transfer in a thread that is left behind when time is over: a collective cannot be called back.

    Raises:
        TrainingError: the client's deadline passed; the calls that gave no answer are named.
    """
    failures: list[BaseException] = []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="publish", daemon=True)
    thread.start()
    while thread.is_alive() and not failures and client.failure is None and not client.expired():
        thread.join(POLL_S)
    if failures:
        raise failures[0]
    if client.failure is not None:
        raise client.failure
    if thread.is_alive():
        thread.join(POLL_S)  # the call that waits for a replica has the same deadline, and tells more
        raise client.failure or TrainingError(
            "sending weights to the rollout engine made no progress for longer than ray.call_timeout_s"
        )


def _nccl(client: ReplicaClient, weights: Callable[[], Weights], rank: int) -> TrainerWeightTransferEngine:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    from rlhf.engines.vllm_transfer import BucketedNccl, ReplayedSource

    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    world_size = 1 + sum(transport.workers for transport in client.transports)
    info = NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=world_size)
    return BucketedNccl.trainer_init(info, client=client, source=ReplayedSource(weights))


def _ipc(client: ReplicaClient, weights: Callable[[], Weights], rank: int) -> TrainerWeightTransferEngine:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine

    from rlhf.engines.shared_memory import BUCKET_BYTES
    from rlhf.engines.vllm_transfer import ReplayedSource

    largest = max((tensor.nbytes for _, tensor in weights()), default=0)
    info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(BUCKET_BYTES, largest))
    return IPCTrainerWeightTransferEngine.trainer_init(info, client=client, source=ReplayedSource(weights))
