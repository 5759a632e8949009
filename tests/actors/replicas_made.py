"""Rollout replicas that draw known responses: in threads of this process, or in processes of their own."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from actors.dispatch import CALLS
from actors.objects import Asked, Drawn
from rlhf.errors import GuardError
from rlhf.types import Prompt, Rollout, Sampling

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
            time.sleep(60)
        return Drawn.of([answer(p, seed) for p, row in zip(prompts, seeds, strict=True) for seed in row])
