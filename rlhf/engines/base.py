"""The contracts between models, objectives and engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from torch import Tensor, nn

from rlhf.recipe.base import Optimizer
from rlhf.recipe.role_schema import Offload, RoleName, RolloutRole, ZeroStage
from rlhf.recipe.tuning_schema import Lora, Tuning
from rlhf.types import Metrics, Rows

B = TypeVar("B", bound=Rows)
T = TypeVar("T")
B_contra = TypeVar("B_contra", bound=Rows, contravariant=True)
Kind = Literal["causal", "scalar", "classes"]


@dataclass(frozen=True)
class LearnerSpec:
    """All that is needed to build a model in any process.

    checkpoint is a Hugging Face folder; `kind` causal has a language-model head, scalar a score head, classes one with
    a row for each of `labels`. `tuning` says which weights train; None freezes the model, which has no `optimizer`
    then. `ranks` processes share every batch, and what `zero_stage` says of the model's state.
    """

    role: RoleName
    kind: Kind
    checkpoint: Path
    dtype: Literal["bfloat16", "float32"]
    tuning: Tuning | None
    optimizer: Optimizer | None
    head_learning_rate: float | None
    max_tokens_per_microbatch: int
    temperature: float
    threads: int
    seed: int
    ranks: int = 1
    zero_stage: ZeroStage = 2
    offload: Offload = "none"
    gradient_checkpointing: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class RolloutSpec:
    """All that is needed to build a rollout engine in any process; `max_length` is prompt + response tokens.

    `usual_length` is what the longest sequence of the data is expected to have, for which memory is set aside; None is
    `max_length`. `lora` is the largest adapter that the engine must serve; None where the policy's weights come merged.
    """

    checkpoint: Path
    dtype: Literal["bfloat16", "float32"]
    role: RolloutRole
    max_length: int
    threads: int
    seed: int
    lora: Lora | None = None
    usual_length: int | None = None


class Objective(Protocol[B_contra]):
    """A loss over a batch, as a sum and a count, so that micro-batches and ranks add up exactly."""

    def count(self, batch: B_contra) -> float:
        """Return the number of items (tokens or pairs) that the loss of this batch sums over."""
        ...

    def loss(self, model: nn.Module, batch: B_contra) -> tuple[Tensor, Metrics]:
        """Return the differentiable sum of the loss over the batch, and metrics."""
        ...


class TrainEngine(Protocol):
    """Owns a module's gradients and optimizer."""

    def step(self, batch: B, objective: Objective[B], lr_scale: float) -> Metrics:
        """Make one optimizer step on the mean loss over `batch` (over all ranks) at `lr_scale` times the base rate."""
        ...

    def run(self, function: Callable[[nn.Module, B], T], batch: B) -> T:
        """Return `function(module, batch)`, with the weights that the module needs in place."""
        ...

    def gathered(self, parameters: Sequence[Tensor], writable: bool = False) -> AbstractContextManager[None]:
        """Make a context in which the parameters are whole on every rank; changes are kept where `writable`."""
        ...

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trained parameter, and its float32 copy, to a whole tensor; all ranks call this with the same."""
        ...

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of what training goes on from, whole, each good until the next; all ranks iterate.

        Names and contents do not depend on the engine, its ranks or its stage.
        """
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave; all ranks call this with the whole of it."""
        ...

    def holdings(self) -> list[object]:
        """Return what leads to every tensor that the engine owns beside the module."""
        ...

    def close(self) -> None:
        """Let go of the module."""
        ...
