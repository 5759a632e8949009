"""The rollout replicas as a policy's process sees them while it sends weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray

from actors.supervise import wait_for_all
from rlhf.engines.served import Ledger, Transport
from rlhf.engines.shared_memory import Answer, content
from rlhf.errors import TrainingError
from rlhf.pulse import PULSE

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class ReplicaClient:
    """vLLM's `VLLMWeightSyncClient` for Ray actors, as its `RayVLLMWeightSyncClient`, but no call waits for ever.

    Each of vLLM's methods waits for all replicas. `announce` does the work of them all, with one call a bucket and
    without waiting: an actor runs the calls of one caller in their order, and `complete` raises what failed in any.
    `failure` is the first failure, for who waits elsewhere.
    """

    def __init__(self, replicas: Sequence[ActorHandle], deadline_s: float) -> None:
        self.replicas = list(replicas)
        self.transports: list[Transport] = []
        self.deadline_s = deadline_s
        self.beats = PULSE.beats
        self.ends = time.monotonic() + deadline_s
        self.ledger = Ledger()
        self.under_way: list[list[ray.ObjectRef]] = []
        self.failure: BaseException | None = None

    def learn_transports(self) -> list[Transport]:
        """Return how each replica wants its weights."""
        answers = self._wait("transport", [replica.transport.remote() for replica in self.replicas])
        transports = [Transport(*answer) for answer in answers]
        kinds = {(transport.backend, transport.workers, transport.adapters) for transport in transports}
        if len(kinds) > 1:
            raise TrainingError(f"the replicas of the rollout engine want their weights in different ways: {kinds}")
        return transports

    def announce(
        self, announcement: dict[str, Any], last: bool, version: int, adapter: dict[str, Any] | None = None
    ) -> Answer:
        """Announce a bucket in this machine's memory; to replicas on other nodes its bytes go with it, put once.

        With the first one the replicas stop serving, and with the last they serve what came as `version`: a whole
        checkpoint, or an adapter of this configuration.

        Returns:
            what waits until no replica reads the bucket any more.
        """
        PULSE.beat()
        first = not self.under_way
        self.ledger.add(announcement)
        here = ray.get_runtime_context().get_node_id()
        elsewhere = [transport.node not in ("", here) for transport in self.transports]
        copy = ray.put(content(announcement)) if any(elsewhere) else None
        about = (announcement, first, version if last else None, adapter if first else None)
        self.under_way.append(
            [
                replica.take_bucket.remote(*about, *([copy] if far else []))
                for replica, far in zip(self.replicas, elsewhere, strict=True)
            ]
        )
        sent = len(self.under_way)
        return lambda: self._settle(sent)

    def complete(self, version: int, checksum: str) -> None:
        """Wait until all replicas serve what was announced."""
        if not self.under_way:
            raise TrainingError("the policy has no weights to publish")
        _check(self._settle(len(self.under_way)), (version, checksum))

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
            self.declare(int(weight_version))

    def declare(self, version: int) -> None:
        """Let the replicas serve as `version` what they have put in place."""
        sent = self.ledger.checksum
        answers = self._all("update_weight_version", lambda r, _: r.update_weight_version.remote(version, sent))
        _check(answers, (version, sent))

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect the replicas."""
        self._all("shutdown", lambda replica, _: replica.shutdown_weight_transfer_engine.remote())

    def expired(self) -> bool:
        """Return whether neither this process nor a replica that it waits for has made progress for the deadline."""
        if self.beats != PULSE.beats:
            self.beats = PULSE.beats
            self.ends = time.monotonic() + self.deadline_s
        return time.monotonic() >= self.ends

    def _all(self, what: str, call: Callable[[ActorHandle, int], ray.ObjectRef]) -> list[Any]:
        return self._wait(what, [call(replica, index) for index, replica in enumerate(self.replicas)])

    def _settle(self, until: int) -> list[Any]:
        """Wait for the first `until` buckets of this publication and return the answers to the last of them."""
        answers: list[Any] = []
        for index, calls in enumerate(self.under_way[:until]):
            if calls:
                answers = self._wait("update_weights", calls)
                self.under_way[index] = []
        return answers

    def _wait(self, what: str, calls: list[ray.ObjectRef]) -> list[Any]:
        names = [f"rollout-{index}.{what}" for index in range(len(calls))]
        try:
            values = wait_for_all(calls, names, self.deadline_s)
            PULSE.beat()
            return values
        except BaseException as error:
            self.failure = error
            raise


def _check(answers: list[Any], expected: tuple[int, str]) -> None:
    for index, answer in enumerate(answers):
        if tuple(answer) != expected:
            raise TrainingError(f"rollout-{index} acknowledged weights {answer}, but the policy sent {expected}")
