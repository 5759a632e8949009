"""From the policy to the rollout engines: merged weights, sent inside the policy's process.

vLLM's own trainer-side interface drives the transfer. Shared memory serves engines on the CPU. `nccl` (engine on GPUs
of its own) and `ipc` (engine on the policy's GPU) are vLLM's backends and need GPUs; tests on a CPU do not run them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from actors.supervise import wait_for
from rlhf.engines.served import Ledger
from rlhf.engines.shared_memory import Weights
from rlhf.errors import RecipeError, TrainingError
from rlhf.roles import WeightReceipt

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from vllm.distributed.weight_transfer.base import TrainerInitInfo

T = TypeVar("T")

SHARE_OF_DEADLINE = 0.9
"""A publication gives up a little before its caller does, so that the replica at fault is named."""


def publish(
    weights: Callable[[], Weights], replicas: list[ActorHandle], version: int, deadline_s: float
) -> WeightReceipt:
    """Send the weights to every replica and return their common acknowledgement.

    `weights()` starts a pass over (checkpoint name, tensor), adapters merged. It is called once on CPU; NCCL asks for
    names and shapes first, which takes a second pass. With several trainer ranks, rank 0 publishes while the others
    make the same passes to take part in gathering.

    Raises:
        TrainingError: a replica failed, did not answer in time, or received something else than was sent; it then
            refuses to generate until a later publication succeeds.
        RecipeError: the replicas wait for weights from a GPU and the policy has none.
    """
    started = time.perf_counter()
    client = ReplicaClient(replicas, deadline_s * SHARE_OF_DEADLINE)
    trainer = _connect(client, weights)
    trainer.send_weights()
    sent = client.ledger.checksum
    _check([checksum for _, checksum in client.served()], sent)
    _check(client.update_weight_version(version), (version, sent))
    client.shutdown_weight_transfer_engine()
    trainer.shutdown()
    return WeightReceipt(version, sent, client.ledger.bytes, time.perf_counter() - started)


class ReplicaClient:
    """vLLM's `VLLMWeightSyncClient` for Ray actors, as its `RayVLLMWeightSyncClient`, but no call waits for ever."""

    def __init__(self, replicas: list[ActorHandle], deadline_s: float) -> None:
        self.replicas = replicas
        self.ends = time.monotonic() + deadline_s
        self.ledger = Ledger()

    def transport(self) -> tuple[str, int]:
        """Return the backend and the worker processes per replica; all replicas are alike."""
        return self._all("transport", lambda replica, _: replica.transport.remote())[0]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the replicas; in an NCCL group the trainer is rank 0 and each replica's workers follow."""
        workers = (init_info.get("world_size", 1) - 1) // len(self.replicas)

        def place(index: int) -> dict[str, Any]:
            if "rank_offset" not in init_info:
                return init_info
            return init_info | {"rank_offset": init_info["rank_offset"] + index * workers}

        self._all("init_weight_transfer_engine", lambda r, index: r.init_weight_transfer_engine.remote(place(index)))

    def start_weight_update(self) -> None:
        """Make the replicas stop serving."""
        self._all("start_weight_update", lambda replica, _: replica.start_weight_update.remote())

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Announce tensors to the replicas and wait until each has them."""
        self.ledger.add(update_info)
        self._all("update_weights", lambda replica, _: replica.update_weights.remote(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let the replicas put the tensors in place."""
        self._all("finish_weight_update", lambda replica, _: replica.finish_weight_update.remote())
        if weight_version is not None:
            self.update_weight_version(int(weight_version))

    def served(self) -> list[tuple[int, str]]:
        """Return each replica's version and the checksum of what it received."""
        return self._all("served", lambda replica, _: replica.served.remote())

    def update_weight_version(self, version: int) -> list[tuple[int, str]]:
        """Let the replicas serve again; return each one's version and checksum."""
        return self._all("update_weight_version", lambda replica, _: replica.update_weight_version.remote(version))

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect the replicas."""
        self._all("shutdown", lambda replica, _: replica.shutdown_weight_transfer_engine.remote())

    def _all(self, what: str, call: Callable[[ActorHandle, int], Any]) -> list[Any]:
        references = [call(replica, index) for index, replica in enumerate(self.replicas)]
        return [
            wait_for(reference, f"rollout-{index}.{what}", max(0.0, self.ends - time.monotonic()))
            for index, reference in enumerate(references)
        ]


def _connect(client: ReplicaClient, weights: Callable[[], Weights]) -> Any:
    """Return vLLM's trainer engine, connected. A new one each time: replicas may have been replaced meanwhile."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    from rlhf.engines.vllm_transfer import ReplayedSource

    backend, workers = client.transport()
    info = _init_info(backend, 1 + workers * len(client.replicas))
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=ReplayedSource(weights))


def _init_info(backend: str, world_size: int) -> TrainerInitInfo:
    """Return the trainer's settings for a backend."""
    import torch

    from rlhf.engines.vllm_transfer import SharedMemoryTrainerInitInfo

    if backend == "shared_memory":
        return SharedMemoryTrainerInitInfo(rank=0)
    if not torch.cuda.is_available():
        raise RecipeError("roles.rollout has GPUs and roles.policy has none: give the policy one, or the rollout none")
    if backend == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        return IPCTrainerInitInfo(rank=0, packed=True)
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    address = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    return NCCLTrainerInitInfo(rank=0, master_address=address, master_port=port, world_size=world_size)


def _check(answers: list[T], expected: T) -> None:
    for index, answer in enumerate(answers):
        if answer != expected:
            raise TrainingError(f"rollout-{index} acknowledged weights {answer}, but the policy sent {expected}")
