"""The parts of `rlhf bench` that need Ray: engine and policy as a run has them, and what calls and objects cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import ray
import torch

from actors.launch import RayLauncher
from actors.objects import byte_count
from actors.process import end
from actors.rollout import RayRollout
from rlhf.bench.ceilings import Place, bandwidth
from rlhf.bench.figures import Figure, Part
from rlhf.bench.learners import learner_spec
from rlhf.bench.measure import Measurement
from rlhf.bench.rollouts import measure_rollouts, published, rollout_spec
from rlhf.bench.setting import CALL_S, Setting
from rlhf.types import TokenBatch

if TYPE_CHECKING:
    from ray.actor import ActorHandle

PUBLICATIONS = 4
ACTORS, CALLS = 4, 100
ROWS, WIDTH, OBJECTS = 1024, 2048, 5
"""A batch of 29 MB."""


class Bare:
    """Answers with nothing."""

    def answer(self) -> None:
        """Return at once."""


@contextmanager
def cluster(setting: Setting) -> Iterator[Mapping[Part, Measurement]]:
    """Start or join Ray as a run of the recipe would, with room for a policy and an engine, and leave it."""
    with RayLauncher(setting.served()) as launcher:
        measured = Measured(setting, launcher)
        yield {"rollouts": measured.rollouts, "transfer": measured.transfer, "ray": measured.overhead}


@dataclass
class Measured:
    """What is measured in one Ray; the engine is started when first needed."""

    setting: Setting
    launcher: RayLauncher

    @cached_property
    def engine(self) -> RayRollout:
        """The rollout engine."""
        return self.launcher.rollout(rollout_spec(self.setting))

    def rollouts(self, known: Sequence[Figure]) -> list[Figure]:
        """Measure generation."""
        return measure_rollouts(self.engine, self.setting, known)

    def transfer(self, known: Sequence[Figure]) -> list[Figure]:
        """Measure publishing a policy to the engine, from the call to its acknowledgement."""
        policy = self.launcher.policy(learner_spec("sft", self.setting))
        receipts = [policy.publish(self.engine, version).result() for version in range(1, 1 + PUBLICATIONS)]
        return published(receipts, self.setting, known)

    def overhead(self, known: Sequence[Figure]) -> list[Figure]:
        """Measure calls that do nothing, to one actor and to several at once, and a batch through the object store.

        The store's limit is copying the batch once, as `get` only maps what `put` has written.
        """
        actors = [ray.remote(Bare).options(num_cpus=0).remote() for _ in range(ACTORS)]
        try:
            one = median_seconds(lambda: _answers(actors[:1]), CALLS)
            all_of_them = median_seconds(lambda: _answers(actors), CALLS)
            batch = _batch()
            through = median_seconds(lambda: ray.get(ray.put(batch), timeout=CALL_S), OBJECTS)
        finally:
            end(actors)
        place = Place("cpu", self.setting.cores)
        copied = bandwidth(known, place)
        on = f"{ACTORS} processes"
        rate = byte_count(batch) / through / 1e9
        return [
            Figure("call", 1e3 * one, "1 process"),
            Figure("fan-out", 1e3 * all_of_them, on),
            Figure("batch", rate, str(place), copied and copied / 2e9),
        ]


def median_seconds(work: Callable[[], object], times: int) -> float:
    """Return the median seconds of some work, after a tenth of the repetitions that do not count."""
    seconds = []
    for _ in range(times + max(1, times // 10)):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[-times:])


def _answers(actors: list[ActorHandle]) -> None:
    ray.get([actor.answer.remote() for actor in actors], timeout=CALL_S)


def _batch() -> TokenBatch:
    ones = torch.ones(ROWS, WIDTH, dtype=torch.bool)
    return TokenBatch(ones.long(), ones, ones, ones.float())
