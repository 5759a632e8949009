"""Turns on devices that the rollout engine shares with models: one of them holds the memory at a time.

    generate            engine: weights and KV cache      models: in main memory
    score, learn        engine: weights in main memory    models: on the device
    publish             engine: weights                   models: on the device

Nobody else needs to know: every call to an engine or a model that shares takes the turn that it needs. On the CPU
the same calls are made and free nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from actors.group import START_S
from actors.process import end
from actors.repairs import Start
from actors.restarts import Restarts
from actors.rollout import RayRollout
from actors.supervise import CALL_KEY, START_KEY, wait_for_all
from rlhf.errors import LostProcess
from rlhf.roles import EnginePart, Pending, WeightReceipt
from rlhf.types import Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from actors.group import RankGroup


class Turns:
    """Who holds the shared devices; `seconds` is what changing hands has cost so far."""

    def __init__(self) -> None:
        self.groups: list[RankGroup] = []
        self.engine: RayRollout | None = None
        self.awake: set[EnginePart] = set()
        self.models_here = True
        self.seconds = 0.0

    def join(self, group: RankGroup) -> None:
        """Enter the processes of models that stand on the devices."""
        self.groups.append(group)
        group.before_call = self.learn

    def forget_models(self) -> None:
        """Their processes have ended; new ones will join."""
        self.groups.clear()
        self.models_here = True

    def begin(self) -> None:
        """Make room for an engine that is about to start."""
        with self._timed():
            self._put_models(False)

    def began(self, engine: RayRollout) -> None:
        """Enter an engine that has started, awake."""
        self.engine = engine
        self.awake = {"weights", "kv_cache"}

    def learn(self) -> None:
        """Give the devices to the models."""
        with self._timed():
            if self.engine and self.awake:
                self.engine.sleep().result()
                self.awake = set()
            self._put_models(True)

    def publish(self) -> None:
        """Let the engine receive weights from models that are on the devices."""
        self.learn()
        with self._timed():
            self._wake("weights")

    def load(self) -> None:
        """Let the engine read weights from a folder."""
        with self._timed():
            self._put_models(False)
            self._wake("weights")

    def generate(self) -> None:
        """Give the devices to the engine."""
        with self._timed():
            self._put_models(False)
            self._wake("weights")
            self._wake("kv_cache")

    def _wake(self, part: EnginePart) -> None:
        if self.engine and part not in self.awake:
            self.engine.wake(part).result()
            self.awake.add(part)

    def _put_models(self, here: bool) -> None:
        if here != self.models_here:
            for group in self.groups:
                group.wait("reload" if here else "offload")
            self.models_here = here

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


class SharingRollout(RayRollout):
    """A `RolloutEngine` on devices that it shares with models."""

    def __init__(
        self,
        replicas: list[ActorHandle],
        deadline_s: float,
        turns: Turns,
        max_sequences: int = 64,
        start: Start | None = None,
        restarts: Restarts | None = None,
        start_s: float = START_S,
    ) -> None:
        super().__init__(
            replicas, deadline_s, max_sequences=max_sequences, start=start, restarts=restarts, start_s=start_s
        )
        self.turns = turns
        self.repairing = threading.Lock()

    def wait_until_ready(self) -> None:
        """Wait until every replica has loaded its model."""
        names = [f"{self.role}-{index}.start" for index in range(len(self.replicas))]
        calls = [replica.ping.remote() for replica in self.replicas]
        wait_for_all(calls, names, self.repairs.start_s, START_KEY)

    def mend(self, asked: tuple[ActorHandle, ...], error: LostProcess) -> None:
        """Raise the error: what is lost while the devices change hands leaves nobody in a known place."""
        raise error

    def _supply(self, index: int) -> None:
        """Put another replica in the place of one while nothing is generated: it needs room, and so may the model."""
        with self.repairing:
            end([self.replicas[index]], elsewhere=True)
            try:
                if not self.balance.pause(self.deadline_s, self.at_work):
                    raise LostProcess(f"{self.role} did not come to rest within {self.deadline_s:.0f} s ({CALL_KEY})")
                self.turns.begin()
                replica = self.repairs.restart(index, f"{self.role}-{index}")
                self.turns.began(self)
                if self.source is not None:
                    self.source([replica]).result()
                self.turns.generate()
            finally:
                self.balance.resume()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Pending[list[Rollout]]:
        """Draw `len(seeds[i])` responses to prompt i, once the devices are free."""
        self.turns.generate()
        return super().generate(prompts, sampling, seeds)

    def load(self, folder: Path, version: int) -> Pending[WeightReceipt]:
        """Serve the weights of a Hugging Face folder."""
        self.turns.load()
        return super().load(folder, version)
