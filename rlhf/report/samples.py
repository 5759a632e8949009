"""What goes into a comparison: the scored responses of every run, and its scores of other chats.

Numbers are columns in memory, a few dozen bytes a response; texts are in memory where they came so, or stay in a file
of JSON lines, of which only the offsets are known. That file is what people read, and what finished runs are compared
by.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np
from numpy.typing import NDArray

from rlhf.errors import TrainingError
from rlhf.report.results import Cost

Array = NDArray[np.float64]
Texts = Callable[[int], tuple[str, str]]
"""Returns the prompt and the response of a row."""


@dataclass(frozen=True)
class Sample:
    """One scored response. `kl` is its sequence log(policy/reference) in nats, `tokens` its length.

    `entropy` is the mean over its tokens of the policy's entropy at that place, in nats.

    `reward` is the proxy's score, None where there is no proxy.
    """

    prompt_id: str
    prompt: str
    response: str
    gold: float
    reward: float | None
    kl: float
    tokens: int
    finish_reason: str
    entropy: float


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """Scored responses; each column is `[samples]`.

    `cut` marks responses that ended at the token limit, `characters` counts those of a response, and `distinct` is the
    number of different responses. `reward` is None where there is no proxy.
    """

    prompt_ids: tuple[str, ...]
    gold: Array
    reward: Array | None
    kl: Array
    tokens: Array
    entropy: Array
    cut: NDArray[np.bool_]
    characters: Array
    distinct: int
    texts: Texts

    @classmethod
    def of(cls, rows: Iterable[Sample]) -> Samples:
        """Keep all rows, texts too, in memory; TrainingError where only some have a reward."""
        texts: list[tuple[str, str]] = []
        columns = Columns()
        for row in rows:
            columns.add(row)
            texts.append((row.prompt, row.response))
        return columns.samples(texts.__getitem__)

    def without_reward(self) -> Samples:
        """Return the same responses without the proxy's scores."""
        return replace(self, reward=None)

    def __len__(self) -> int:
        """Return the number of responses."""
        return len(self.prompt_ids)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """Return one response, or those of a slice, with their texts."""
        rows = range(len(self))[index]
        return self._row(rows) if isinstance(rows, int) else [self._row(row) for row in rows]

    def __eq__(self, other: object) -> bool:
        """Return whether the responses, texts and numbers, are the same."""
        return isinstance(other, Samples) and len(self) == len(other) and all(map(_alike, self, other))

    def _row(self, row: int) -> Sample:
        prompt, response = self.texts(row)
        return Sample(
            prompt_id=self.prompt_ids[row],
            prompt=prompt,
            response=response,
            gold=float(self.gold[row]),
            reward=None if self.reward is None else float(self.reward[row]),
            kl=float(self.kl[row]),
            tokens=int(self.tokens[row]),
            finish_reason="length" if self.cut[row] else "stop",
            entropy=float(self.entropy[row]),
        )


def _alike(one: Sample, other: Sample) -> bool:
    return one == other or repr(one) == repr(other)  # nan is not itself


class Columns:
    """Collects the numbers of responses, one after the other."""

    def __init__(self) -> None:
        self.prompt_ids: list[str] = []
        self.numbers = {name: array("d") for name in ("gold", "reward", "kl", "tokens", "entropy", "characters")}
        self.cut = array("b")
        self.digests: set[bytes] = set()
        self.rewarded = 0

    def add(self, row: Sample) -> None:
        """Take the numbers of a response, and of its text the length and whether it is new."""
        self.prompt_ids.append(sys.intern(row.prompt_id))
        for name, column in self.numbers.items():
            value = len(row.response) if name == "characters" else getattr(row, name)
            column.append(math.nan if value is None else value)
        self.cut.append(row.finish_reason == "length")
        self.digests.add(hashlib.blake2b(row.response.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        self.rewarded += row.reward is not None

    def samples(self, texts: Texts) -> Samples:
        """Return the responses so far; TrainingError where only some have a reward."""
        if self.rewarded not in (0, len(self.prompt_ids)):
            raise TrainingError("compare: some samples have a proxy reward and some have none; score all or none")
        columns = {name: np.frombuffer(column, dtype=np.float64) for name, column in self.numbers.items() if column}
        columns = {name: columns.get(name, np.empty(0)) for name in self.numbers}
        return Samples(
            prompt_ids=tuple(self.prompt_ids),
            gold=columns["gold"],
            reward=columns["reward"] if self.rewarded else None,
            kl=columns["kl"],
            tokens=columns["tokens"],
            entropy=columns["entropy"],
            cut=np.array(self.cut, dtype=np.bool_),
            characters=columns["characters"],
            distinct=len(self.digests),
            texts=texts,
        )


@dataclass(frozen=True, eq=False)
class ChatScores:
    """-log p of what the assistant says in each chat, in nats `[chats]`, and its tokens by the baseline's tokenizer."""

    nats: Array
    tokens: Array

    @classmethod
    def of(cls, nats: Iterable[float] = (), tokens: Iterable[int] = ()) -> ChatScores:
        """Keep the scores of chats in their order."""
        return cls(np.array(list(nats), dtype=np.float64), np.array(list(tokens), dtype=np.float64))

    def __len__(self) -> int:
        """Return the number of chats."""
        return len(self.nats)

    def __eq__(self, other: object) -> bool:
        """Return whether all scores are the same."""
        return isinstance(other, ChatScores) and all(map(np.array_equal, vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class CandidateSamples:
    """All samples of one run (`ppo@2`, or `ppo` where there is one); every run has the same prompt ids in order.

    `preference_accuracy` is the share of held-out pairs that its implicit reward orders rightly, where measured.
    `retention` are its scores of the retention chats, the same ones in the same order for every run.
    """

    name: str
    kind: str
    samples: Samples
    cost: Cost | None = None
    preference_accuracy: float | None = None
    retention: ChatScores = field(default_factory=ChatScores.of)
