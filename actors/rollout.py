"""The rollout engine as Ray actors: one replica per process, and their common face to the controller."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.supervise import RayPending, wait_for
from rlhf.engines.base import RolloutSpec
from rlhf.engines.served import ServedWeights
from rlhf.engines.shared_memory import Bucket, Checksum, folder_weights, receive, send
from rlhf.roles import WeightReceipt
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from rlhf.engines.hf_generate import TransformersEngine
    from rlhf.engines.vllm_generate import Backend, VllmEngine


class RolloutActor:
    """One replica; the weight methods are those of vLLM's native interface, whichever engine is behind them."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.engine = _engine(spec)

    def ping(self) -> int:
        """Return this process's id, once the engine is ready."""
        return os.getpid()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """Draw `len(seeds[i])` responses to prompt i, in the order of prompts and seeds."""
        return self.engine.generate(prompts, sampling, seeds)

    def load(self, folder: Path, version: int) -> WeightReceipt:
        """Serve the weights of a Hugging Face folder."""
        return self.engine.load(folder, version)

    def served(self) -> tuple[int, str]:
        """Return the version served and the checksum of its weights."""
        return self.engine.served()

    def transport(self) -> tuple[Backend, int]:
        """Return how weights reach this replica, and into how many worker processes."""
        return self.engine.transport()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""
        self.engine.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        """Stop serving and begin an update."""
        self.engine.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive some of the tensors."""
        self.engine.update_weights(update_info)

    def finish_weight_update(self) -> None:
        """Put the tensors in place."""
        self.engine.finish_weight_update()

    def update_weight_version(self, version: int) -> tuple[int, str]:
        """Serve again, as `version`; return it and the checksum."""
        return self.engine.update_weight_version(version)

    def shutdown_weight_transfer_engine(self) -> None:
        """Disconnect from the trainer."""
        self.engine.shutdown_weight_transfer_engine()


class TransformersReplica:
    """A `TransformersEngine` behind the methods that `VllmEngine` has; weights arrive through shared memory."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.weights = ServedWeights()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """Draw `len(seeds[i])` responses to prompt i; TrainingError in the middle of a weight update."""
        self.weights.check_serving()
        return self.engine.generate(prompts, sampling, seeds)

    def load(self, folder: Path, version: int) -> WeightReceipt:
        """Serve the weights of a Hugging Face folder, as `version`."""
        started = time.perf_counter()
        self.start_weight_update()
        send(folder_weights(folder), self.update_weights)
        self.finish_weight_update()
        version, checksum = self.update_weight_version(version)
        return WeightReceipt(version, checksum, self.weights.ledger.bytes, time.perf_counter() - started)

    def served(self) -> tuple[int, str]:
        """Return the version and the checksum of its weights."""
        return self.weights.served()

    def transport(self) -> tuple[Backend, int]:
        """Return how weights reach this engine, and into how many worker processes."""
        return "shared_memory", 1

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Nothing to connect."""

    def shutdown_weight_transfer_engine(self) -> None:
        """Nothing to disconnect."""

    def start_weight_update(self) -> None:
        """Stop serving and begin an update."""
        self.weights.begin()
        self._checksum = Checksum()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Verify one bucket and copy its tensors into the model."""
        try:
            self.engine.load_weights(iter(receive(Bucket(**update_info), self._checksum)), self.engine.version)
        except BaseException:
            self.weights.phase = "failed"
            raise
        self.weights.ledger.add(update_info)

    def finish_weight_update(self) -> None:
        """All tensors have arrived."""
        self.weights.finish()

    def update_weight_version(self, version: int) -> tuple[int, str]:
        """Serve again, as `version`."""
        self.engine.version = version
        return self.weights.declare(version)


class RayRollout:
    """A `RolloutEngine` of one or more replicas; `role` names them in messages."""

    def __init__(self, replicas: list[ActorHandle], deadline_s: float, role: str = "rollout") -> None:
        self.replicas = replicas
        self.deadline_s = deadline_s
        self.role = role

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> DealtRollouts:
        """Deal the prompts out to the replicas; the result comes in the order of prompts and seeds."""
        count = len(self.replicas)
        references = [
            replica.generate.remote(list(prompts[index::count]), sampling, list(seeds[index::count]))
            for index, replica in enumerate(self.replicas)
        ]
        return DealtRollouts(references, [len(row) for row in seeds], self.deadline_s, self.role)

    def load(self, folder: Path, version: int) -> RayPending[WeightReceipt]:
        """Serve the weights of a Hugging Face folder on every replica; the receipt is the last one's."""
        references = [replica.load.remote(folder, version) for replica in self.replicas]
        return RayPending(references, f"{self.role}.load", self.deadline_s)


class DealtRollouts:
    """Rollouts on their way from replicas that were dealt prompts in turn, `counts[i]` responses to prompt i."""

    def __init__(self, references: list[Any], counts: list[int], deadline_s: float, role: str) -> None:
        self.references = references
        self.counts = counts
        self.deadline_s = deadline_s
        self.role = role

    def result(self) -> list[Rollout]:
        """Return them in the order of prompts; TrainingError names a replica that failed."""
        hands = [
            iter(wait_for(reference, f"{self.role}-{index}.generate", self.deadline_s))
            for index, reference in enumerate(self.references)
        ]
        return [next(hands[index % len(hands)]) for index, count in enumerate(self.counts) for _ in range(count)]


def _engine(spec: RolloutSpec) -> VllmEngine | TransformersReplica:
    if spec.role.engine == "vllm":
        from rlhf.engines.vllm_generate import VllmEngine

        return VllmEngine(spec)
    from rlhf.engines.hf_generate import TransformersEngine

    return TransformersReplica(TransformersEngine(spec))
