"""What is done on one rank with TorchEngine and on two with DeepSpeed, to be compared."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine_cases import CASES, token_batch
from torch import Tensor, nn

from rlhf.engines.base import TrainEngine
from rlhf.engines.scoring import score_rows, score_tokens, sequence_scores
from rlhf.models.scalar import fold_standardisation
from rlhf.types import Experience, ValueBatch


@dataclass(frozen=True)
class RankCase:
    objective: str
    stage: Literal[0, 1, 2, 3]
    lora: bool
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def kind(self) -> Literal["causal", "scalar"]:
        return CASES[self.objective].kind

    def __str__(self) -> str:
        return f"{self.objective}-zero{self.stage}-{'lora' if self.lora else 'full'}-{self.dtype}"


RANK_CASES = [
    *(RankCase(name, stage, lora) for name in CASES for stage in (0, 2) for lora in (False, True)),
    *(RankCase(name, stage, lora) for name in ("sft", "policy") for stage in (1, 3) for lora in (False, True)),
    RankCase("reward", 3, False),
    *(RankCase("sft", stage, False, "bfloat16") for stage in (1, 2, 3)),
]


@dataclass(frozen=True)
class Outcome:
    """Sums of the metrics of every step, parameters before and after, and what the model says of `token_batch`."""

    start: dict[str, Tensor]
    steps: list[dict[str, tuple[float, float]]]
    parameters: dict[str, Tensor]
    scores: Tensor


def drive(
    engine: TrainEngine,
    module: nn.Module,
    case: RankCase,
    max_tokens: int,
    gathered: Callable[..., AbstractContextManager[None]],
) -> Outcome:
    """Step on a batch and on one row of it (the second rank has none); PPO also meets an infinite advantage.

    Scoring between the steps, and standardising scores after them, must disturb nothing.
    """
    start = parameters(module, gathered)
    chosen = CASES[case.objective]
    batch: Any = chosen.batch()
    steps = [engine.step(batch, chosen.objective, 1.0)]
    score(module, case, max_tokens)
    steps.append(engine.step(batch.select([1]), chosen.objective, 0.5))
    if isinstance(batch, Experience | ValueBatch):
        steps.append(engine.step(poisoned(batch), chosen.objective, 1.0))
        steps.append(engine.step(batch, chosen.objective, 1.0))
    if case.kind == "scalar":
        with gathered(writable=True):
            fold_standardisation(module, 0.5, 2.0)
    scores = score(module, case, max_tokens)
    return Outcome(start, [step.sums for step in steps], parameters(module, gathered), scores)


def parameters(module: nn.Module, gathered: Callable[..., AbstractContextManager[None]]) -> dict[str, Tensor]:
    with gathered():
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def poisoned(batch: Experience | ValueBatch) -> Experience | ValueBatch:
    """One infinite advantage or return: it reaches one rank only, and both must skip the step."""
    column = "advantages" if isinstance(batch, Experience) else "returns"
    bad = getattr(batch, column).clone()
    bad[1, 8] = float("inf")
    return replace(batch, **{column: bad})


def score(module: nn.Module, case: RankCase, max_tokens: int) -> Tensor:
    module.eval()
    if case.kind == "causal":
        return score_tokens(module, token_batch(), 1.0, max_tokens).logprobs
    return score_rows(sequence_scores, module, token_batch(), max_tokens)
