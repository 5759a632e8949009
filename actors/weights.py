"""From the policy to the rollout engines: merged weights or an adapter, sent inside the policy's processes.

On the CPU, and for adapters everywhere, the weights go through shared memory, or through Ray's object store to
replicas on other machines. `nccl` (engine on GPUs of its own) and `ipc` (engine on the policy's GPUs) are vLLM's
backends, driven by its own trainer-side interface; they need GPUs, and tests on a CPU do not run them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from actors.replicas import ReplicaClient
from rlhf.engines.served import Transport
from rlhf.engines.shared_memory import Outbox, Weights
from rlhf.roles import WeightReceipt

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from actors.gpu_weights import GpuSender

SHARE_OF_DEADLINE = 0.9
"""A publication gives up a little before its caller does, so that the replica at fault is named."""


class Adapted(Protocol):
    """A policy with LoRA adapters."""

    def adapter_weights(self) -> Weights:
        """Start a pass over (name in PEFT's checkpoint, tensor)."""
        ...

    def adapter_config(self) -> dict[str, Any]:
        """Return what PEFT writes into adapter_config.json."""
        ...


class Publisher:
    """Sends one policy's weights, and keeps between publications what costs time to get.

    That is shared memory, the connection, and how the replicas want their weights; when replicas were replaced or a
    publication failed, all is got anew.
    """

    def __init__(self) -> None:
        self.replicas: list[ActorHandle] = []
        self.transports: list[Transport] = []
        self.outbox: Outbox | None = None
        self.sender: GpuSender | None = None

    def __reduce__(self) -> tuple[type[Publisher], tuple[()]]:
        """In another process it begins anew: memory and connection belong to this one."""
        return Publisher, ()

    def publish(
        self,
        weights: Callable[[], Weights],
        replicas: list[ActorHandle],
        version: int,
        deadline_s: float,
        rank: int = 0,
        adapter: Adapted | None = None,
    ) -> WeightReceipt:
        """Send the weights to every replica and return their common acknowledgement; every rank calls this.

        `weights()` starts a pass over (checkpoint name, tensor), adapters merged; a tensor need only be valid until
        the next one is asked for. Replicas that serve adapters get those of `adapter` instead. All ranks make the same
        pass; rank 0 sends and has the receipt, the others' is empty but for its version.

        Raises:
            TrainingError: a replica failed, did not answer in time, or received something else than was sent. It
                refuses to generate until a later publication succeeds; the other replicas refuse too, or serve the new
                version.
            RecipeError: the replicas wait for weights from a GPU and the policy has none.
        """
        started = time.perf_counter()
        client = ReplicaClient(replicas, deadline_s * SHARE_OF_DEADLINE)
        try:
            self._meet(client)
            config = adapter.adapter_config() if adapter and self.transports[0].adapters else None
            if adapter is not None and config is not None:
                checksum = self._through_memory(client, adapter.adapter_weights, version, rank, config)
            elif self.transports[0].backend == "shared_memory":
                checksum = self._through_memory(client, weights, version, rank)
            else:
                checksum = self._between_gpus(client, weights, version, rank)
        except BaseException:
            self.forget()
            raise
        return WeightReceipt(version, checksum, client.ledger.bytes, time.perf_counter() - started)

    def forget(self) -> None:
        """Give up memory and connection; buckets that a late replica still asks for are gone."""
        if self.outbox is not None:
            self.outbox.close()
        if self.sender is not None:
            self.sender.abandon()
        self.replicas, self.transports, self.outbox, self.sender = [], [], None, None

    def _meet(self, client: ReplicaClient) -> None:
        """Learn how these replicas want their weights, unless they are those of the last time."""
        if client.replicas != self.replicas:
            self.forget()
            self.transports = client.learn_transports()
            self.replicas = list(client.replicas)
        client.transports = self.transports

    def _through_memory(
        self,
        client: ReplicaClient,
        weights: Callable[[], Weights],
        version: int,
        rank: int,
        adapter: dict[str, Any] | None = None,
    ) -> str:
        """Send bucket by bucket. No call is waited for but where its buffer is needed again, and the last one.

        Ranks other than 0 take part in gathering; rank 0 goes on with that also when a replica has failed, so that
        the others are not left in a collective.
        """
        passing = iter(weights())
        if rank > 0:
            for _ in passing:
                pass
            return ""
        if self.outbox is None:
            self.outbox = Outbox()
        try:
            checksum = self.outbox.send(passing, partial(client.announce, version=version, adapter=adapter))
        except Exception:
            for _ in passing:
                pass
            raise
        client.complete(version, checksum)
        return checksum

    def _between_gpus(self, client: ReplicaClient, weights: Callable[[], Weights], version: int, rank: int) -> str:
        from actors.gpu_weights import GpuSender

        if self.sender is None:
            self.sender = GpuSender(client, weights, rank)
        self.sender.send(client, weights)
        if rank == 0:
            client.declare(version)
        return client.ledger.checksum


publish = Publisher().publish
"""The publisher of this process, which holds one policy at a time."""
