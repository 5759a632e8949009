"""What travels between the controller and the actors: batches once for all receivers, responses as columns."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, chain
from typing import Any

import numpy as np
import ray
from torch import Tensor

from rlhf.types import Prompt, Rollout, Rows, Sampling

INLINE_BYTES = 64 * 1024
"""Below this a batch goes with each call: that is faster than a round through the object store, which takes about a
millisecond to put and another to get. Ray itself copies arguments above 100 KiB into the store, once per call."""


class Pickled:
    """A value pickled once for many calls; it arrives as the value itself."""

    def __init__(self, value: Any) -> None:
        self.data = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle to the value."""
        return pickle.loads, (self.data,)


class Shipped:
    """Makes of a batch what is handed to a remote call, once for all receivers, by identity.

    Large batches go into the object store: the policy, the reference, the reward model and the critic, with all their
    ranks, then read the same object, which is freed when the batch and the last call that reads it are gone. Small
    ones are pickled once and travel with each call. A batch must not be written to once it was shipped.
    """

    def __init__(self, inline_bytes: int = INLINE_BYTES) -> None:
        self.inline_bytes = inline_bytes
        self.parcels: dict[int, tuple[weakref.ref[Rows], Pickled | ray.ObjectRef]] = {}

    def __call__(self, batch: Rows) -> Any:
        """Return what unpickles to the batch in the actor: an ObjectRef of it, or its bytes where it is small."""
        key = id(batch)
        known = self.parcels.get(key)
        if known is None or known[0]() is not batch:
            forget = weakref.ref(batch, lambda dead: self._forget(key, dead))
            small = byte_count(batch) <= self.inline_bytes
            known = self.parcels[key] = forget, Pickled(batch) if small else ray.put(batch)
        return known[1]

    def _forget(self, key: int, dead: weakref.ref[Rows]) -> None:
        known = self.parcels.get(key)
        if known is not None and known[0] is dead:
            del self.parcels[key]


def once(value: Any) -> Any:
    """Return what unpickles to `value` in each of several calls, pickled here once however large it is."""
    pickled = Pickled(value)
    return pickled if len(pickled.data) <= INLINE_BYTES else ray.put(value)


def byte_count(batch: Rows) -> int:
    """Return the bytes of all tensors of a batch, those of nested batches included."""
    return sum(tensor.nbytes for tensor in _tensors(batch))


def _tensors(batch: Rows) -> Iterator[Tensor]:
    for item in fields(batch):  # type: ignore[arg-type]
        value = getattr(batch, item.name)
        if isinstance(value, Rows):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


@dataclass(frozen=True)
class Asked:
    """What one call asks a replica for: `len(seeds[i])` responses to prompt i, of which it needs no text.

    tokens int32 of all prompts one after another; ids, lengths and seeds have one entry per prompt.
    """

    ids: list[str]
    tokens: np.ndarray
    lengths: np.ndarray
    seeds: list[list[int]]
    sampling: Sampling

    @staticmethod
    def of(prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]) -> Asked:
        """Return the columns of prompts."""
        return Asked(
            [prompt.id for prompt in prompts],
            np.fromiter(chain.from_iterable(prompt.tokens for prompt in prompts), np.int32),
            np.array([len(prompt.tokens) for prompt in prompts], np.int32),
            [list(row) for row in seeds],
            sampling,
        )

    def prompts(self) -> list[Prompt]:
        """Return the prompts, without text and metadata."""
        tokens, ends = self.tokens.tolist(), list(accumulate(self.lengths.tolist(), initial=0))
        return [Prompt(name, tuple(tokens[ends[i] : ends[i + 1]]), "") for i, name in enumerate(self.ids)]


@dataclass(frozen=True)
class Drawn:
    """The responses of one call as columns, a few buffers instead of an object per token.

    tokens int32 and logprobs float32 (what engines compute in) of all responses one after another; lengths, texts and
    stopped (an end-of-sequence token came, not the limit) have one entry per response. Prompts stay with the caller.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    lengths: np.ndarray
    texts: list[str]
    stopped: np.ndarray
    version: int

    @staticmethod
    def of(rollouts: Sequence[Rollout]) -> Drawn:
        """Return the columns of rollouts that were all drawn from the same weights."""
        lengths = [len(rollout.tokens) for rollout in rollouts]
        total = sum(lengths)
        return Drawn(
            np.fromiter(chain.from_iterable(rollout.tokens for rollout in rollouts), np.int32, total),
            np.fromiter(chain.from_iterable(rollout.logprobs for rollout in rollouts), np.float32, total),
            np.array(lengths, np.int32),
            [rollout.text for rollout in rollouts],
            np.array([rollout.finish_reason == "stop" for rollout in rollouts], np.bool_),
            rollouts[0].policy_version if rollouts else 0,
        )

    def rollouts(self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]]) -> Iterator[Rollout]:
        """Yield the rollouts, in the order of prompts and seeds."""
        tokens, logprobs = self.tokens.tolist(), self.logprobs.tolist()
        ends = list(accumulate(self.lengths.tolist(), initial=0))
        asked = ((prompt, seed) for prompt, row in zip(prompts, seeds, strict=True) for seed in row)
        for index, ((prompt, seed), stopped) in enumerate(zip(asked, self.stopped.tolist(), strict=True)):
            span = slice(ends[index], ends[index + 1])
            yield Rollout(
                prompt=prompt,
                tokens=tuple(tokens[span]),
                logprobs=tuple(logprobs[span]),
                text=self.texts[index],
                finish_reason="stop" if stopped else "length",
                policy_version=self.version,
                seed=seed,
            )
