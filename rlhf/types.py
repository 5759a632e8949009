"""What travels between roles, shape first.

Letters: `B` sequences, `T` tokens (prompt + response, right-padded), `P` preference pairs, `V` vocabulary.

One alignment rule: position `t` of every `[B, T]` tensor is about token `t`. So `logprobs[b, t]` is
`log p(tokens[b, t] | tokens[b, :t])`, `values[b, t]` is the value before token `t` is emitted, and
position 0 of both is 0. Masks are True where the thing is real.

One PPO sample, with prompt "2+2=" (4 tokens) and response "4" + end-of-sequence (2 tokens), T = 6:

    tokens            [50, 43, 50, 61, 52,  2]
    attention_mask    [ 1,  1,  1,  1,  1,  1]
    response_mask     [ 0,  0,  0,  0,  1,  1]
    rollout_logprobs  [ 0,  0,  0,  0, -.7, -.1]   from the engine that sampled
    old_logprobs      the trainer's, same weights    ref_logprobs  the frozen reference's
    rewards           [ 0,  0,  0,  0, -kl, score - kl]
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

FinishReason = Literal["stop", "length"]

warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # see Portable


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy sees it: `tokens` after the chat template, `text` as the user wrote it."""

    id: str
    tokens: tuple[int, ...]
    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rollout:
    """One sampled response; `tokens` are the response's ids, the end-of-sequence token included.

    `logprobs[i]` is the engine's log-probability of `tokens[i]`; `text` leaves special tokens out.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    policy_version: int
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; with temperature 1 and top_p 1 they are exact samples of the policy.

    `allowed`, where not empty, are the only tokens that may be drawn; the logprobs are then among these alone.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    allowed: tuple[int, ...] = ()


class Portable:
    """A dataclass whose tensors travel between processes as plain buffers, many times faster than tensors do.

    Out-of-band pickling (protocol 5) copies nothing, and where the buffers lie in shared memory the tensors that arrive
    are views of it: nobody may write into them. Tensors arrive on the CPU, with no gradient.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the fields apart for pickle."""
        return _rebuilt, (type(self), *(_buffer(getattr(self, item.name)) for item in fields(self)))  # type: ignore[arg-type]


def _buffer(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dtype == torch.bfloat16:  # numpy has no bfloat16
        return value
    return value.detach().cpu().numpy()


def _rebuilt(kind: type, *values: Any) -> Any:
    return kind(*(torch.from_numpy(value) if isinstance(value, np.ndarray) else value for value in values))


class Rows(Portable):
    """A batch whose tensors share their first dimension; rows can be selected and padding trimmed."""

    def __len__(self) -> int:
        """Return the number of rows."""
        value = getattr(self, fields(self)[0].name)  # type: ignore[arg-type]
        return len(value)

    def select(self, rows: Sequence[int]) -> Self:
        """Return the given rows, in that order; nested batches are selected too."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        picked = {}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            picked[item.name] = value.select(rows) if isinstance(value, Rows) else value[index]
        return replace(self, **picked)  # type: ignore[type-var]

    def narrow(self, width: int) -> Self:
        """Return the first `width` columns of every `[rows, T]` tensor; the caller knows that the rest is padding."""
        cut = {}
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, Rows):
                cut[item.name] = value.narrow(width)
            else:
                cut[item.name] = value[:, :width] if value.ndim == 2 else value
        return replace(self, **cut)  # type: ignore[type-var]

    def trim(self) -> Self:
        """Drop the columns that are padding in every row."""
        return self.narrow(int(self.lengths().max()))

    def token_count(self) -> int:
        """Return the real tokens of all rows, which is what training on them costs."""
        return int(self.lengths().sum())

    def to(self, device: torch.device) -> Self:
        """Return the batch with every tensor on `device`."""
        moved = {item.name: getattr(self, item.name).to(device) for item in fields(self)}  # type: ignore[arg-type]
        return replace(self, **moved)  # type: ignore[type-var]

    def lengths(self) -> Tensor:
        """Return the real tokens of each row, `[rows]`, the cost that padded passes are cut by."""
        raise NotImplementedError

    def flat_lengths(self) -> Tensor:
        """Return how many tokens each row is when it is laid flat, `[rows]`, the cost that flat passes are cut by."""
        return self.lengths()

    def prompt_lengths(self) -> Tensor:
        """Return how many tokens of each row stand before its response, `[rows]`; 0 without one."""
        raise NotImplementedError

    def families(self) -> list[list[int]]:
        """Return all rows, in lists of those whose prompts are equal token by token, in order of appearance."""
        raise NotImplementedError


@dataclass(frozen=True)
class TokenBatch(Rows):
    """Right-padded sequences.

    tokens            `[B, T]` int64
    attention_mask    `[B, T]` bool, True on real tokens
    response_mask     `[B, T]` bool, True on the tokens that are trained or scored
    rollout_logprobs  `[B, T]` float32, 0 where no engine sampled the token
    """

    tokens: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    rollout_logprobs: Tensor

    def lengths(self) -> Tensor:
        """Return the real tokens of each row, `[B]`."""
        return self.attention_mask.sum(dim=1)

    def prompt_lengths(self) -> Tensor:
        """Return how many tokens of each row stand before its response, `[B]`; 0 without one."""
        return self.response_mask.int().argmax(dim=1)

    def families(self) -> list[list[int]]:
        """Return all rows, in lists of those whose prompts are equal token by token; a row without prompt is alone."""
        found: dict[object, list[int]] = {}
        tokens = self.tokens.cpu().numpy()
        for row, length in enumerate(self.prompt_lengths().tolist()):
            found.setdefault(tokens[row, :length].tobytes() if length else row, []).append(row)
        return list(found.values())

    @property
    def width(self) -> int:
        """`T`, padding included."""
        return int(self.tokens.shape[1])

    @staticmethod
    def stack(parts: Sequence[TokenBatch]) -> TokenBatch:
        """Return the rows of all parts as one batch, padded to the widest."""
        width = max(part.width for part in parts)
        columns = zip(*(tuple(getattr(part, item.name) for item in fields(part)) for part in parts), strict=True)
        return TokenBatch(*(torch.cat([pad(c, (0, width - c.shape[1])) for c in column]) for column in columns))


@dataclass(frozen=True)
class TokenScores(Portable):
    """What a language model says of a batch: `logprobs` and `entropy` (nats), `[B, T]`, 0 off the response."""

    logprobs: Tensor
    entropy: Tensor


class Sequences(Rows):
    """A batch of which each row is one sequence, `batch`."""

    batch: TokenBatch

    def lengths(self) -> Tensor:
        """Return the real tokens of each row, `[B]`."""
        return self.batch.lengths()

    def prompt_lengths(self) -> Tensor:
        """Return how many tokens of each row stand before its response, `[B]`; 0 without one."""
        return self.batch.prompt_lengths()

    def families(self) -> list[list[int]]:
        """Return all rows, in lists of those with the same prompt."""
        return self.batch.families()


@dataclass(frozen=True)
class Experience(Sequences):
    """What the policy of an online method learns from; it exists only when every role has spoken.

    scores `[B]` are the reward of whole responses; all others are `[B, T]`, 0 off the response.
    """

    batch: TokenBatch
    scores: Tensor
    kl: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class ValueBatch(Sequences):
    """What a critic learns from: its values when the responses were scored, and the returns; both `[B, T]`."""

    batch: TokenBatch
    values: Tensor
    returns: Tensor


@dataclass(frozen=True)
class PreferenceBatch(Rows):
    """`P` pairs; `response_mask` marks the completions. `*_ref_logprobs` `[P]` are sums over the completion.

    `margins` `[P]` says by how much the chosen one is better (0 when unknown).
    """

    chosen: TokenBatch
    rejected: TokenBatch
    margins: Tensor
    chosen_ref_logprobs: Tensor
    rejected_ref_logprobs: Tensor

    def lengths(self) -> Tensor:
        """Return the real tokens of the longer side twice, `[P]`: both sides go through the model together."""
        return 2 * torch.maximum(self.chosen.lengths(), self.rejected.lengths())

    def flat_lengths(self) -> Tensor:
        """Return the tokens of both sides with one prompt, `[P]`."""
        return self.chosen.lengths() + self.rejected.lengths() - self.chosen.prompt_lengths()

    def prompt_lengths(self) -> Tensor:
        """Return 0 for each pair, `[P]`: no pair shares a prompt with another (its sides do)."""
        return torch.zeros(len(self), dtype=torch.long)

    def families(self) -> list[list[int]]:
        """Return each pair alone."""
        return [[row] for row in range(len(self))]

    def token_count(self) -> int:
        """Return the real tokens of both sides of all pairs."""
        return self.chosen.token_count() + self.rejected.token_count()

    def trim(self) -> PreferenceBatch:
        """Drop the columns that are padding on both sides."""
        return replace(self, chosen=self.chosen.trim(), rejected=self.rejected.trim())


@dataclass(frozen=True)
class LabelledBatch(Sequences):
    """`B` single responses, each good or bad (KTO).

    `desirable` `[B]` bool; `ref_logprobs` `[B]` are sums over the response. `kl` `[B]` is the same in every row: the
    reference point, an estimate of KL(policy || reference) over the whole batch that this one was cut from.
    """

    batch: TokenBatch
    desirable: Tensor
    ref_logprobs: Tensor
    kl: Tensor


class Metrics(Mapping[str, float]):
    """Name → mean, kept as (sum, count), so that merging over micro-batches and ranks is exact."""

    def __init__(self, sums: Mapping[str, tuple[float, float]] | None = None) -> None:
        self.sums: dict[str, tuple[float, float]] = dict(sums or {})

    @classmethod
    def of(cls, count: float = 1, **sums: float | Tensor) -> Metrics:
        """Build from sums that share one count: `Metrics.of(n, loss=total_loss)`."""
        return cls({name: (float(value), float(count)) for name, value in sums.items()})

    def merge(self, other: Metrics) -> Metrics:
        """Return both added up, name by name."""
        merged = dict(self.sums)
        for name, (total, count) in other.sums.items():
            old_total, old_count = merged.get(name, (0.0, 0.0))
            merged[name] = (old_total + total, old_count + count)
        return Metrics(merged)

    def __getitem__(self, name: str) -> float:
        """Return the mean of `name`; nan when nothing was counted."""
        total, count = self.sums[name]
        return total / count if count else float("nan")

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.sums)

    def __len__(self) -> int:
        """Return the number of names."""
        return len(self.sums)
