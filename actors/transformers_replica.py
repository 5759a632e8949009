"""The transformers engine as a rollout replica: served weights, one generation at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.engines.gate import Gate
from rlhf.engines.served import ServedWeights, Transport
from rlhf.engines.shared_memory import Bucket, Inbox, folder_weights, send
from rlhf.errors import TrainingError
from rlhf.roles import EnginePart, WeightReceipt
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from rlhf.engines.hf_generate import TransformersEngine


class TransformersReplica:
    """A `TransformersEngine` behind the methods that `VllmEngine` has; weights arrive through shared memory."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.weights = ServedWeights()
        self.gate = Gate(self.weights.check_serving)
        self.turn = threading.Lock()
        self.inbox = Inbox()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Rollout]:
        """Draw `len(seeds[i])` responses to prompt i, one call after another; TrainingError during a weight update."""
        with self.gate.passing(), self.turn:
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

    def transport(self) -> Transport:
        """Return how weights reach this engine: always merged."""
        return Transport("shared_memory", 1)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Nothing to connect."""

    def shutdown_weight_transfer_engine(self) -> None:
        """Nothing to disconnect."""

    def start_weight_update(self, adapter: dict[str, Any] | None = None) -> None:
        """Stop serving and begin an update."""
        if adapter is not None:
            raise TrainingError("engine: transformers serves no adapters; use `roles.rollout.weights: merged`")
        self.weights.begin()
        self.gate.drain()
        self.inbox.begin()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Verify one bucket and copy its tensors into the model."""
        with self.weights.receiving(update_info):
            self.engine.load_weights(iter(self.inbox.receive(Bucket(**update_info))), self.engine.version)

    def finish_weight_update(self) -> None:
        """All tensors have arrived."""
        self.weights.finish()

    def update_weight_version(self, version: int, checksum: str | None = None) -> tuple[int, str]:
        """Serve again, as `version`, what has this checksum."""
        self.engine.version = version
        return self.weights.declare(version, checksum)

    def sleep(self) -> None:
        """Refuse to generate until woken; the memory stays."""
        self.weights.sleep()
        self.gate.drain()

    def wake(self, part: EnginePart) -> None:
        """Note that a part may be used again."""
        self.weights.wake(part)
