"""Rollout replicas that draw known responses: in threads of this process, or in processes of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.dispatch import CALLS
from actors.objects import Asked, Drawn
from actors.supervise import wait_for_all
from rlhf.errors import GuardError, TrainingError
from rlhf.roles import WeightReceipt
from rlhf.types import Metrics, Prompt, Rollout, Sampling, TokenBatch

if TYPE_CHECKING:
    from rlhf.engines.base import LearnerSpec

PROMPTS = [Prompt(f"p{row}", (1, 2) + (3,) * (row % 5), f"text {row}", {"row": row}) for row in range(40)]
SEEDS = [[10 * row, 10 * row + 1] for row in range(40)]
SAMPLING = Sampling(16)


def answer(prompt: Prompt, seed: int) -> Rollout:
    """What a replica draws: known from prompt and seed, of 1 to 4 tokens."""
    length = 1 + (seed * 7 + len(prompt.tokens)) % 4
    tokens = tuple(range(seed, seed + length))
    return Rollout(prompt, tokens, (-0.5,) * length, f"{prompt.id}/{seed}", "stop" if seed % 3 else "length", 4, seed)


def expected() -> list[Rollout]:
    return [answer(prompt, seed) for prompt, row in zip(PROMPTS, SEEDS, strict=True) for seed in row]


class Reference:
    """Stands for an ObjectRef."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        return self._future


class Threaded:
    """A replica in threads of this process; `wait(prompt)` is how long one prompt takes."""

    def __init__(self, wait: Callable[[Prompt], float]) -> None:
        self.wait = wait
        self.pool = ThreadPoolExecutor(CALLS)
        self.lock = threading.Lock()
        self.prompts: list[str] = []
        self.sizes: list[int] = []
        self.outstanding = self.most = 0

    @property
    def draw(self) -> Threaded:
        return self

    def remote(self, asked: Asked) -> Reference:
        prompts, seeds = asked.prompts(), asked.seeds
        with self.lock:
            self.prompts += [prompt.id for prompt in prompts]
            self.sizes.append(len(prompts))
            self.outstanding += sum(map(len, seeds))
            self.most = max(self.most, self.outstanding)
        return Reference(self.pool.submit(self._draw, prompts, seeds))

    def _draw(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> Drawn:
        time.sleep(sum(map(self.wait, prompts)))
        with self.lock:
            self.outstanding -= sum(map(len, seeds))
        return Drawn.of([answer(p, seed) for p, row in zip(prompts, seeds, strict=True) for seed in row])


class Actor:
    """A replica in a process of its own that fails where it is told to."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.calls = 0

    def draw(self, asked: Asked) -> Drawn:
        prompts, seeds = asked.prompts(), asked.seeds
        assert all(prompt.text == "" and not prompt.metadata for prompt in prompts)
        self.calls += 1
        if self.fault and self.calls == 2:
            if self.fault == "raises":
                raise GuardError("the weights are gone")
            if self.fault == "dies":
                os._exit(1)
            time.sleep(600)
        return Drawn.of([answer(p, seed) for p, row in zip(prompts, seeds, strict=True) for seed in row])


class Server:
    """A replica in a process of its own whose weights are a number, which its logprobs show."""

    def __init__(self, wait_s: float = 0.05) -> None:
        self.wait_s = wait_s
        self.weights, self.version, self.awake = 0.0, 0, True

    def ping(self) -> int:
        return os.getpid()

    @ray.method(concurrency_group="generate")
    def draw(self, asked: Asked) -> Drawn:
        if not self.awake:
            raise TrainingError("asleep")
        prompts, seeds = asked.prompts(), asked.seeds
        time.sleep(self.wait_s * len(prompts))
        return Drawn.of(
            [
                drawn_with(self.weights, self.version, p, seed)
                for p, row in zip(prompts, seeds, strict=True)
                for seed in row
            ]
        )

    def load(self, folder: Path, version: int) -> WeightReceipt:
        return self.serve(float(folder.name), version)

    def serve(self, weights: float, version: int) -> WeightReceipt:
        self.weights, self.version = weights, version
        return WeightReceipt(version, str(weights), 0, 0.0)

    def served(self) -> tuple[float, int]:
        return self.weights, self.version

    def sleep(self) -> None:
        self.awake = False

    def wake(self, part: str) -> None:
        self.awake = part == "kv_cache" or self.awake


class Hanging(Server):
    """Draws everything but one prompt."""

    @ray.method(concurrency_group="generate")
    def draw(self, asked: Asked) -> Drawn:
        if PROMPTS[7].id in asked.ids:
            time.sleep(600)
        return Drawn.of([answer(p, seed) for p, row in zip(asked.prompts(), asked.seeds, strict=True) for seed in row])


def drawn_with(weights: float, version: int, prompt: Prompt, seed: int) -> Rollout:
    """What a `Server` draws."""
    rollout = answer(prompt, seed)
    return replace(rollout, logprobs=(-weights,) * len(rollout.tokens), policy_version=version)


class Number:
    """One rank of a model whose weights are a number: training adds one to it."""

    def __init__(self) -> None:
        self.weights, self.here = 0.0, True

    def meeting_point(self) -> tuple[str, int]:
        return "", 0

    def join(self, *_: object) -> None:
        pass

    def build(self, spec: LearnerSpec) -> int:
        self.weights = float(spec.seed)
        return os.getpid()

    def train(self, batch: TokenBatch, *_: object) -> Metrics:
        time.sleep(0.5)
        self.weights += 1
        return Metrics()

    def scores(self, batch: TokenBatch) -> float:
        time.sleep(1)
        return self.weights + float(batch.tokens.sum())

    def publish(self, replicas: list[Any], version: int, deadline_s: float) -> WeightReceipt:
        assert self.here
        calls = [replica.serve.remote(self.weights, version) for replica in replicas]
        return wait_for_all(calls, [f"rollout-{index}.serve" for index in range(len(calls))], deadline_s)[-1]

    def offload(self) -> None:
        self.here = False

    def reload(self) -> None:
        self.here = True

    def drop(self) -> None:
        self.weights = 0.0
