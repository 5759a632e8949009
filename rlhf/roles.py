"""What the controller may ask of each role. No Ray here: `rlhf.local` and `actors.launch` both build these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Generic, Literal, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.engines.base import B, LearnerSpec, Objective, RolloutSpec
    from rlhf.manifest import Seal
    from rlhf.types import Metrics, Prompt, Rollout, Sampling, TokenBatch, TokenScores, ValueBatch

T_co = TypeVar("T_co", covariant=True)
EnginePart = Literal["weights", "kv_cache"]


class Pending(Protocol[T_co]):
    """A result on its way."""

    def result(self) -> T_co:
        """Wait for it (bounded by the recipe's deadline) and return it, or raise what went wrong."""
        ...


@dataclass(frozen=True)
class Ready(Generic[T_co]):
    """A `Pending` that is there already."""

    value: T_co

    def result(self) -> T_co:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class WeightReceipt:
    """An engine's acknowledgement of new weights: what it serves from now on, and what the transfer cost."""

    version: int
    checksum: str
    bytes: int
    seconds: float


class Learner(Protocol):
    """A model that may be trained. `train` makes one optimizer step per minibatch of row indices."""

    def train(
        self, batch: B, objective: Objective[B], minibatches: Sequence[Sequence[int]], lr_scale: float
    ) -> Pending[Metrics]:
        """Step once per minibatch at `lr_scale` times the base learning rates."""
        ...

    def evaluate(self, batch: B, objective: Objective[B]) -> Pending[Metrics]:
        """Return the objective's metrics with no gradient."""
        ...

    def save(self, folder: Path) -> Pending[None]:
        """Write a Hugging Face folder with adapters merged, and the tokenizer."""
        ...

    def save_adapter(self, folder: Path) -> Pending[None]:
        """Write a PEFT folder of what was learned beside the model that training started from."""
        ...

    def state_bytes(self) -> Pending[int]:
        """Return how many bytes `save_state` writes, about."""
        ...

    def save_state(self, folder: Path) -> Pending[Mapping[str, Seal]]:
        """Write what training goes on from into a folder: weights in float32, moments, count of updates.

        The files are flushed; their seals come back by name.
        """
        ...

    def load_state(self, folder: Path) -> Pending[None]:
        """Go on from what `save_state` wrote, bit for bit, or but for rounding where the ranks are others."""
        ...

    def offload(self) -> Pending[None]:
        """Move weights, gradients and optimizer out of accelerator memory; nothing to do on CPU."""
        ...

    def reload(self) -> Pending[None]:
        """Move them back."""
        ...


class Reference(Protocol):
    """A frozen language model."""

    def logprobs(self, batch: TokenBatch) -> Pending[TokenScores]:
        """Score the response tokens, `[B, T]`."""
        ...


class Policy(Learner, Reference, Protocol):
    """The language model being aligned."""

    def base_logprobs(self, batch: TokenBatch) -> Pending[TokenScores]:
        """Score the response tokens with the adapters off, `[B, T]`."""
        ...

    def publish(self, engine: RolloutEngine, version: int) -> Pending[WeightReceipt]:
        """Send the merged weights to the engine and return its acknowledgement."""
        ...


@dataclass(frozen=True)
class SharedReference:
    """The reference as the policy's own base with the adapters off: no second copy of the weights."""

    policy: Policy

    def logprobs(self, batch: TokenBatch) -> Pending[TokenScores]:
        """Score the response tokens, `[B, T]`."""
        return self.policy.base_logprobs(batch)


class Scalar(Protocol):
    """A model with a scalar head, used as reward model or critic."""

    def scores(self, batch: TokenBatch) -> Pending[Tensor]:
        """Return the reward of each whole sequence, `[B]`: the head at its last real token."""
        ...

    def values(self, batch: TokenBatch) -> Pending[Tensor]:
        """Return the value before each response token, `[B, T]`."""
        ...


class Reward(Scalar, Learner, Protocol):
    """The reward model."""

    def standardise(self, mean: float, std: float) -> Pending[None]:
        """Fold (score - mean) / std into the head."""
        ...


class Critic(Scalar, Learner, Protocol):
    """The value model of PPO."""

    def fit_values(self, batch: ValueBatch) -> Pending[Tensor]:
        """Set the head to the ridge regression of the returns, before anything is trained.

        Returns the value before each response token, `[B, T]`, by a fit that has not seen the row's prompt.
        """
        ...


class RolloutEngine(Protocol):
    """Generates responses with the policy's weights."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[Sequence[int]]
    ) -> Pending[list[Rollout]]:
        """Draw `len(seeds[i])` responses to prompt i, one per seed, in the order of prompts and seeds."""
        ...

    def load(self, folder: Path, version: int) -> Pending[WeightReceipt]:
        """Serve the weights of a Hugging Face folder of the same architecture."""
        ...

    def sleep(self) -> Pending[None]:
        """Move the weights out of accelerator memory and drop the KV cache; nothing to do on CPU."""
        ...

    def wake(self, part: EnginePart) -> Pending[None]:
        """Bring one of them back: the weights, and after them the cache."""
        ...


class Launcher(Protocol):
    """Builds roles, each ready to be called, and takes them down again."""

    def policy(self, spec: LearnerSpec) -> Policy:
        """Start the policy."""
        ...

    def reference(self, spec: LearnerSpec) -> Reference:
        """Start a reference with weights of its own."""
        ...

    def reward(self, spec: LearnerSpec) -> Reward:
        """Start the reward model."""
        ...

    def critic(self, spec: LearnerSpec) -> Critic:
        """Start the critic."""
        ...

    def rollout(self, spec: RolloutSpec) -> RolloutEngine:
        """Start the rollout engine, or reuse a live one of the same shape."""
        ...

    def judge(self, spec: RolloutSpec) -> RolloutEngine:
        """Start an engine with a judge's own model, or reuse a live one of the same spec."""
        ...

    def seconds_in_turns(self) -> float:
        """Return the seconds spent so far on handing shared devices from the engine to models and back."""
        ...

    def recover(self) -> None:
        """End the processes of the stage that just failed, so that it can begin again with new ones."""
        ...

    def release(self) -> None:
        """Free the models of the stage that just finished; processes and the engines stay for the next."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@dataclass(frozen=True)
class Roles:
    """The roles of every online method; a critic belongs to the advantage estimator that needs it."""

    policy: Policy
    reference: Reference
    reward: RewardSource
    rollout: RolloutEngine


class RewardSource(Protocol):
    """Anything that scores finished rollouts: a reward model, a Python function."""

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Tensor]:
        """Return one finite score per rollout, `[B]`."""
        ...
