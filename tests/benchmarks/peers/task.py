"""What an arm is told and what it answers, as JSON files; the peers' interpreters import this, so only the library."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

Arm = Literal["ours", "defaults", "tuned"]
PAD, EOS, UNKNOWN = range(3)
LEARNING_RATE = 1e-6
BETA = {"dpo": 0.1, "grpo": 0.04, "rloo": 0.05, "ppo": 0.05}
RESPONSE = 48
PPO_EPOCHS = 2


class File:
    """A dataclass that is kept as a JSON file."""

    def write(self, path: Path) -> None:
        """Write it."""
        path.write_text(json.dumps(asdict(self)))  # type: ignore[call-overload]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read it; lists stay lists."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True)
class Example:
    """A prompt and its completions, as token ids: one for SFT, chosen and rejected, or a group; none to be sampled."""

    prompt: list[int]
    completions: list[list[int]]

    def tokens(self) -> int:
        """Return the real tokens of all its sequences, the prompt in each."""
        return sum(len(self.prompt) + len(completion) for completion in self.completions)


@dataclass(frozen=True)
class Task(File):
    """One process: which row and arm, the model folders, and the examples of each optimizer step, in order.

    `old_logprobs` is the recipes' setting of that name, for our arm: `rollout` has no pass before a step.
    """

    row: str
    arm: Arm
    causal: str
    scalar: str
    threads: int
    steps: list[list[dict[str, list]]]
    old_logprobs: str = "recompute"

    def examples(self) -> list[list[Example]]:
        """Return the examples of each step."""
        return [[Example(**example) for example in step] for step in self.steps]


@dataclass
class Outcome(File):
    """What a process measured, a number per step; `tokens` are those that really went in, padding left out.

    `losses` are what both arms must agree on, and `grad_norms` before clipping where the arm tells them.
    `reference_seconds` is what our arm spends up front on the reference of each step's examples.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    reference_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_bytes: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    parts: list[dict[str, float]] = field(default_factory=list)


def reward_of(completion: list[int]) -> float:
    """Return the reward that both arms give a completion: the share of its tokens with an even id."""
    return sum(token % 2 == 0 for token in completion) / len(completion)
