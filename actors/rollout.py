"""The rollout engine as Ray actors: one replica per process, and their common face to the controller."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.balance import Balance
from actors.dispatch import CALLS, Dispatch
from actors.group import START_S
from actors.objects import Asked, Drawn
from actors.process import end
from actors.progress import Watch, id_of, tell_progress
from actors.repairs import Repairs, Start, answers
from actors.restarts import Restarts
from actors.supervise import RayPending, Retried
from actors.transformers_replica import TransformersReplica
from rlhf.engines.base import RolloutSpec
from rlhf.engines.served import Transport
from rlhf.engines.shared_memory import Buffer
from rlhf.errors import LostProcess
from rlhf.roles import EnginePart, Pending, WeightReceipt
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    import numpy as np
    from ray.actor import ActorHandle

    from rlhf.engines.vllm_generate import VllmEngine


class RolloutActor:
    """One replica; the weight methods are those of vLLM's native interface, whichever engine is behind them."""

    def __init__(self, spec: RolloutSpec) -> None:
        tell_progress()
        self.engine = _engine(spec)
        self.copy: Buffer | None = None

    def ping(self) -> int:
        """Return this process's id, once the engine is ready."""
        return os.getpid()

    @ray.method(concurrency_group="generate")
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """Draw `len(seeds[i])` responses to prompt i, in the order of prompts and seeds."""
        return self.engine.generate(prompts, sampling, seeds)

    @ray.method(concurrency_group="generate")
    def draw(self, asked: Asked) -> Drawn:
        """Do as `generate` does, with prompts and responses as columns."""
        return Drawn.of(self.engine.generate(asked.prompts(), asked.sampling, asked.seeds))

    def load(self, folder: Path, version: int) -> WeightReceipt:
        """Serve the weights of a Hugging Face folder."""
        return self.engine.load(folder, version)

    def served(self) -> tuple[int, str]:
        """Return the version served and the checksum of its weights."""
        return self.engine.served()

    def transport(self) -> Transport:
        """Return how weights reach this replica, and on which node it is."""
        return self.engine.transport()._replace(node=ray.get_runtime_context().get_node_id())

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""
        self.engine.init_weight_transfer_engine(init_info)

    def take_bucket(
        self,
        announcement: dict[str, Any],
        first: bool,
        version: int | None,
        adapter: dict[str, Any] | None = None,
        content: np.ndarray | None = None,
    ) -> tuple[int, str]:
        """Receive a part of an update: the first begins it, and one with a version ends it. Return what is served.

        The update is of the whole model, or of an adapter of this configuration; `content` is the announced memory
        where that is another machine's.
        """
        if first:
            self.engine.start_weight_update(adapter)
        if content is not None:
            self.copy = self.copy or Buffer()
            self.copy.fill(content)
            announcement = announcement | {"path": self.copy.path}
        self.engine.update_weights(announcement)
        if version is not None:
            self.engine.finish_weight_update()
            self.engine.update_weight_version(version, announcement["checksum"])
        return self.engine.served()

    def start_weight_update(self) -> None:
        """Stop serving and begin an update."""
        self.engine.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive some of the tensors."""
        self.engine.update_weights(update_info)

    def finish_weight_update(self) -> None:
        """Put the tensors in place."""
        self.engine.finish_weight_update()

    def update_weight_version(self, version: int, checksum: str | None = None) -> tuple[int, str]:
        """Serve again, as `version`; return it and the checksum, which must be the one given."""
        return self.engine.update_weight_version(version, checksum)

    def sleep(self) -> None:
        """Move the weights out of the GPU and drop the KV cache."""
        self.engine.sleep()

    def wake(self, part: EnginePart) -> None:
        """Bring one of them back."""
        self.engine.wake(part)

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect from the trainer."""
        self.engine.shutdown_weight_transfer_engine()


Replica = ray.remote(concurrency_groups={"generate": CALLS})(RolloutActor)
"""`RolloutActor` in a process of its own: generate calls run side by side and share the engine's batch, all others run
one at a time in the order in which they were sent."""


FEW = 16
"""So many replicas' handles, of about 400 bytes each, go with a call."""


Source = Callable[[list["ActorHandle"]], Pending[WeightReceipt]]
"""Sends some replicas the weights that the engine is to serve."""


class RayRollout:
    """A `RolloutEngine` of one or more replicas, each generating `max_sequences` at once; `role` names them.

    A replica that dies or hangs is replaced by what `start` starts, as often as `restarts` allows. The new one gets the
    present weights from `source` before it serves: the folder last loaded, or the model that published last.
    """

    def __init__(
        self,
        replicas: list[ActorHandle],
        deadline_s: float,
        role: str = "rollout",
        max_sequences: int = 64,
        start: Start | None = None,
        restarts: Restarts | None = None,
        start_s: float = START_S,
    ) -> None:
        self.replicas = replicas
        self.deadline_s = deadline_s
        self.role = role
        self.balance = Balance(len(replicas), max_sequences)
        self.repairs = Repairs(replicas, self.balance, restarts or Restarts(role), start, self._supply, start_s)
        self.source: Source | None = None
        self.parcel: tuple[list[ActorHandle], ray.ObjectRef] | None = None
        self.calls: weakref.WeakSet[Dispatch] = weakref.WeakSet()
        self.watch = Watch()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Pending[list[Rollout]]:
        """Send the prompts to the replicas as these have room; the result comes in the order of prompts and seeds."""
        call = Dispatch(
            self.replicas,
            self.balance,
            prompts,
            sampling,
            seeds,
            self.deadline_s,
            self.role,
            self.repairs.begin,
            self.at_work,
        )
        self.calls.add(call)
        return call

    def handles(self) -> list[ActorHandle] | ray.ObjectRef:
        """Return the replicas as an argument for many calls: a large list is pickled once, not for each of them."""
        if len(self.replicas) <= FEW:
            return self.replicas
        if self.parcel is None or self.parcel[0] != self.replicas:
            self.parcel = list(self.replicas), ray.put(self.replicas)
        return self.parcel[1]

    def load(self, folder: Path, version: int) -> Pending[WeightReceipt]:
        """Serve the weights of a Hugging Face folder on every replica; the receipt is the last one's."""
        for call in self.calls:  # what a stage that ended early still generates
            call.stop()

        def load(replicas: list[ActorHandle]) -> RayPending[WeightReceipt]:
            return self._pending("load", [replica.load.remote(folder, version) for replica in replicas])

        self.source = load
        return Retried(self, lambda: load(self.replicas))

    def sleep(self) -> Pending[None]:
        """Move the weights of every replica out of the GPU and drop its KV cache."""
        return Retried(self, lambda: self._pending("sleep", [replica.sleep.remote() for replica in self.replicas]))

    def wake(self, part: EnginePart) -> Pending[None]:
        """Bring one of them back on every replica."""
        return Retried(self, lambda: self._pending("wake", [replica.wake.remote(part) for replica in self.replicas]))

    def current(self) -> tuple[ActorHandle, ...]:
        """Return the replicas as they are now."""
        return tuple(self.replicas)

    def mend(self, asked: tuple[ActorHandle, ...], error: LostProcess) -> None:
        """Replace those of the replicas asked that no longer answer; raise the error where all of them do."""
        there = answers(list(asked))
        if all(there):
            raise error
        repairs = [self.repairs.begin(i, handle, error) for i, handle in enumerate(asked) if not there[i]]
        for repair in repairs:
            repair.result()

    def alive(self) -> bool:
        """Return whether every replica still answers, and none was lost for good."""
        return self.repairs.settled() and all(answers(self.replicas))

    def at_work(self) -> bool:
        """Return whether any replica has made progress since this was asked last."""
        return self.watch.look([id_of(replica) for replica in self.replicas])

    def kill(self, elsewhere: bool = False) -> None:
        """End the processes; `elsewhere` as for `actors.process.end`."""
        self.repairs.stop()
        end(self.replicas, elsewhere)

    def _supply(self, index: int) -> None:
        """Put another replica in the place of one, with the present weights."""
        replica = self.repairs.restart(index, f"{self.role}-{index}")
        if self.source is not None:
            self.source([replica]).result()

    def _pending(self, method: str, calls: list[ray.ObjectRef]) -> RayPending[Any]:
        numbers = range(len(calls)) if len(calls) == len(self.replicas) else ["new"] * len(calls)
        return RayPending(calls, [f"{self.role}-{number}.{method}" for number in numbers], self.deadline_s)


def _engine(spec: RolloutSpec) -> VllmEngine | TransformersReplica:
    if spec.role.engine == "vllm":
        from rlhf.engines.vllm_generate import VllmEngine

        return VllmEngine(spec)
    from rlhf.engines.hf_generate import TransformersEngine

    return TransformersReplica(TransformersEngine(spec))
