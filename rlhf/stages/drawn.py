"""Responses of one model on disk: what was sampled, part by part, and read back for a few prompts at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf.data.lazy import Lazy
from rlhf.data.rows import PromptRow
from rlhf.data.sequences import TokenSequence
from rlhf.data.store import stored
from rlhf.data.tokenize import tokenize_prompts
from rlhf.errors import DataError
from rlhf.models.tokenizer import ChatTokenizer
from rlhf.stages.parts import Columns, Parts
from rlhf.types import FinishReason, Prompt, Rollout

TOGETHER = 256
"""Prompts that are tokenised at once."""


class Answer(NamedTuple):
    """A response as people read it; `tokens` is its length."""

    prompt_id: str
    prompt: str
    response: str
    tokens: int
    finish_reason: FinishReason


@dataclass(frozen=True)
class Drawn:
    """A model's responses, `each` to every prompt, side by side; their part of memory is what is asked for.

    `foreign` says that its tokenizer is not the baseline's.
    """

    name: str
    prompts: Sequence[Prompt]
    foreign: bool
    each: int
    parts: Parts

    @property
    def done(self) -> int:
        """How many prompts have their responses."""
        return self.parts.done(self.name)

    def add(self, rollouts: Sequence[Rollout], logprobs: Tensor, entropy: Tensor, gaps: Tensor) -> None:
        """Keep the responses to the next prompts.

        `logprobs` `[B]` are the model's own of whole responses, `entropy` `[B]` means over their tokens, in nats;
        `gaps` `[B]` say by how much the engine's logprobs differ, added up over the tokens.
        """
        texts = [rollout.text.encode("utf-8", "surrogatepass") for rollout in rollouts]
        columns: dict[str, NDArray[Any]] = {
            "lengths": np.array([len(rollout.tokens) for rollout in rollouts], dtype=np.int64),
            "tokens": np.fromiter(chain.from_iterable(rollout.tokens for rollout in rollouts), np.int32),
            "engine": np.fromiter(chain.from_iterable(rollout.logprobs for rollout in rollouts), np.float32),
            "bytes": np.array([len(text) for text in texts], dtype=np.int64),
            "text": np.frombuffer(b"".join(texts), dtype=np.uint8),
            "cut": np.array([rollout.finish_reason == "length" for rollout in rollouts]),
            "seeds": np.array([rollout.seed for rollout in rollouts], dtype=np.uint64),
            "logprobs": logprobs.numpy(),
            "entropy": entropy.numpy(),
            "gaps": gaps.numpy(),
        }
        self.parts.add(self.name, self.done + len(rollouts) // self.each, columns)

    def rollouts(self, start: int, end: int) -> list[Rollout]:
        """Return the responses to prompts `start` to `end` (not included)."""
        found: list[Rollout] = []
        for columns, first, last in self.parts.read(self.name, start, end):
            place = start + len(found) // self.each
            found += self._rollouts(self.prompts[place : place + last - first], columns, first, last)
        return found

    def gap(self) -> tuple[float, int]:
        """Return the sum of all gaps so far, in nats, and the tokens that it is of."""
        return float(self.parts.column(self.name, "gaps").sum()), int(self.parts.column(self.name, "lengths").sum())

    def numbers(self, name: str, start: int, end: int) -> Tensor:
        """Return `logprobs` or `entropy` of the responses to some prompts, `[B]`."""
        files = self.parts.read(self.name, start, end)
        rows = [columns.rows(name, first * self.each, last * self.each) for columns, first, last in files]
        return torch.from_numpy(np.concatenate(rows))

    def answers(self) -> Iterator[Answer]:
        """Yield all responses without their tokens."""
        place = 0
        for columns, first, last in self.parts.read(self.name, 0, self.done):
            prompts = self.prompts[place : place + last - first]
            place += last - first
            lengths, cut = columns["lengths"].tolist(), columns["cut"].tolist()
            for row, text in enumerate(_texts(columns, slice(0, len(lengths)))):
                prompt = prompts[row // self.each]
                yield Answer(prompt.id, prompt.text, text, lengths[row], "length" if cut[row] else "stop")

    def _rollouts(self, prompts: Sequence[Prompt], columns: Columns, first: int, last: int) -> Iterator[Rollout]:
        rows = slice(first * self.each, last * self.each)
        tokens, logprobs = (_pieces(columns, name, "lengths", rows) for name in ("tokens", "engine"))
        cut, seeds = columns["cut"][rows].tolist(), columns["seeds"][rows].tolist()
        for row, (ids, engine, text) in enumerate(zip(tokens, logprobs, _texts(columns, rows), strict=True)):
            yield Rollout(
                prompt=prompts[row // self.each],
                tokens=tuple(ids.tolist()),
                logprobs=tuple(engine.tolist()),
                text=text,
                finish_reason="length" if cut[row] else "stop",
                policy_version=0,
                seed=seeds[row],
            )


def _texts(columns: Columns, rows: slice) -> Iterator[str]:
    return (piece.tobytes().decode("utf-8", "surrogatepass") for piece in _pieces(columns, "text", "bytes", rows))


def _pieces(columns: Columns, name: str, lengths: str, rows: slice) -> Iterator[NDArray[Any]]:
    """Yield the stretch of a flat column that belongs to each of some rows."""
    ends = np.concatenate([[0], np.cumsum(columns[lengths])])[rows.start : rows.stop + 1]
    flat = columns.rows(name, int(ends[0]), int(ends[-1]))
    return (flat[start:end] for start, end in zip(ends[:-1] - ends[0], ends[1:] - ends[0], strict=True))


def stored_prompts(rows: Sequence[PromptRow], tokenizer: ChatTokenizer, most: int) -> Lazy[Prompt]:
    """Tokenise prompts of at most `most` tokens, and keep the tokens on disk; errors as in `tokenize_prompts`."""
    places: dict[str, str] = {}
    for row in rows:
        if row.id in places:
            raise DataError(f"{row.where}: prompt id '{row.id}' is taken already, by {places[row.id]}")
        places[row.id] = row.where

    def sequences() -> Iterator[TokenSequence]:
        for start in range(0, len(rows), TOGETHER):
            for prompt in tokenize_prompts(rows[start : start + TOGETHER], tokenizer, most):
                yield TokenSequence(prompt.tokens, (False,) * len(prompt.tokens))

    tokens = stored(sequences())
    return Lazy(lambda i: Prompt(rows[i].id, tokens[i].tokens, rows[i].text, rows[i].metadata), len(rows))
