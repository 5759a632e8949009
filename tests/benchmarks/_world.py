"""A cluster without processes: stand-ins for actor handles and object references, on a virtual clock."""

from __future__ import annotations

import heapq
import pickle
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from actors.objects import Asked, Drawn, Pickled, byte_count
from rlhf.engines.shares import Part
from rlhf.roles import WeightReceipt
from rlhf.types import Metrics, Prompt, Rollout, Rows

MAX_SEQUENCES, MAX_TOKENS = 64, 2048
MEAN_TOKENS, SPREAD = 1024, 0.5
TOKEN_S = 0.02
HANDLE_BYTES = 420


@dataclass
class Counts:
    """What passed the controller in a phase."""

    calls: int = 0
    objects: int = 0
    sent: int = 0
    received: int = 0
    cpu_s: float = 0.0


class Reference:
    """Stands for an ObjectRef."""

    def __init__(self, value: Any = None, size: int = 0) -> None:
        self.value, self.size = value, size
        self.done: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.done


class World:
    """The virtual clock, what has been counted, and the time that the simulation itself took."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[tuple[float, int, Reference]] = []
        self.counts = Counts()
        self.own_s = 0.0

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Work of the simulation, not of the controller."""
        began = time.thread_time()
        yield
        self.own_s += time.thread_time() - began

    def at(self, when: float, reference: Reference) -> None:
        heapq.heappush(self.events, (when, self.counts.calls, reference))

    def call(self, arguments: Sequence[Any]) -> None:
        self.counts.calls += 1
        self.counts.sent += sum(map(size_of, arguments))

    def put(self, value: Any) -> Reference:
        with self.outside():
            self.counts.objects += 1
            self.counts.sent += size_of(value)
            return Reference(value)

    def get(self, references: Sequence[Reference], timeout: float) -> list[Any]:
        with self.outside():
            self.counts.received += sum(reference.size for reference in references)
            for reference in references:
                reference.size = 0
            return [reference.value for reference in references]

    @contextmanager
    def phase(self) -> Iterator[Counts]:
        """Count a phase; its CPU seconds are those of this process but for the simulation's own."""
        self.counts, self.own_s, began = Counts(), 0.0, time.process_time()
        yield self.counts
        self.counts.cpu_s = time.process_time() - began - self.own_s


def size_of(value: Any) -> int:
    """Return the bytes that a value takes on the wire."""
    if isinstance(value, Reference):
        return 0
    if isinstance(value, Pickled):
        return len(value.data)
    if isinstance(value, Rows):
        return byte_count(value)
    if isinstance(value, list) and value and isinstance(value[0], Replica):
        return HANDLE_BYTES * len(value)
    return len(pickle.dumps(value))


class Clockwork(SimpleQueue):
    """The queue of ended calls of a dispatch; to wait for one is to move the virtual clock to its end."""

    world: World

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if self.empty():
            when, _, reference = heapq.heappop(self.world.events)
            self.world.now = max(self.world.now, when)
            self.world.counts.received += reference.size
            reference.done.set_result(reference.value)
        return super().get()


class Lengths(Drawn):
    """Responses that have lengths and no contents."""

    def rollouts(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> Iterator[Rollout]:
        for prompt, row in zip(prompts, seeds, strict=True):
            for seed in row:
                yield Rollout(prompt, (), (), "", "stop", 0, seed)


class Replica:
    """A rollout engine that generates `MAX_SEQUENCES` responses at once, each in its own time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.free = [0.0] * MAX_SEQUENCES
        self.tokens = 0

    @property
    def draw(self) -> Replica:
        return self

    def remote(self, asked: Asked) -> Reference:
        with self.world.outside():
            self.world.call((asked,))
            lengths = response_lengths([seed for row in asked.seeds for seed in row])
            ends = [self._end(length) for length in lengths.tolist()]
            self.tokens += int(lengths.sum())
            drawn = Lengths(lengths, lengths, lengths, [], lengths, 0)
            reference = Reference(drawn, 8 * int(lengths.sum()))
            self.world.at(max(ends), reference)
            return reference

    def _end(self, length: int) -> float:
        end = max(self.world.now, heapq.heappop(self.free)) + TOKEN_S * length
        heapq.heappush(self.free, end)
        return end


def response_lengths(seeds: Sequence[int]) -> np.ndarray:
    """Return each seed's response length: log-normal, cut at `MAX_TOKENS`."""
    normal = LENGTHS[np.asarray(seeds) % len(LENGTHS)]
    return np.clip(MEAN_TOKENS * np.exp(SPREAD * normal - SPREAD**2 / 2), 1, MAX_TOKENS).astype(np.int32)


LENGTHS = np.random.default_rng(0).standard_normal(1 << 16)


class Rank:
    """One rank of a model: answers for its share of the rows, of no width where only scheduling is measured."""

    def __init__(self, world: World, rank: int, ranks: int, rows: int, width: int, measured: int) -> None:
        self.world = world
        share = list(range(rank, measured, ranks))
        scale = rows / measured
        values = {
            "logprobs": torch.zeros(len(share), 2, width),
            "values": torch.zeros(len(share), width),
            "scores": torch.zeros(len(share)),
        }
        values["base_logprobs"] = values["logprobs"]
        self.answers: dict[str, Any] = {name: Part(share, value) for name, value in values.items()}
        self.sizes = {name: int(scale * (value.nbytes + 3 * len(share))) for name, value in values.items()}
        self.answers |= {"train": Metrics.of(1, loss=0.0), "publish": WeightReceipt(1, "", 0, 0.0), "join": None}
        self.answers["meeting_point"] = "", 0

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Reference:
            with self.world.outside():
                self.world.call(arguments)
                return Reference(self.answers[method], self.sizes.get(method, 100))

        return SimpleNamespace(remote=remote)
