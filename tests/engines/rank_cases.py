"""What is done on one rank with TorchEngine and on two with DeepSpeed, to be compared."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from engine_cases import CASES, token_batch
from torch import Tensor, nn

from rlhf.engines.base import TrainEngine
from rlhf.engines.microbatch import rank_passes
from rlhf.engines.scoring import response_logprobs, score_share, sequence_scores
from rlhf.engines.shares import assemble
from rlhf.models.flat_attention import runs_flat
from rlhf.models.scalar import fold_standardisation
from rlhf.recipe.role_schema import Offload
from rlhf.types import Experience, ValueBatch


@dataclass(frozen=True)
class RankCase:
    objective: str
    stage: Literal[0, 1, 2, 3]
    lora: bool
    dtype: Literal["float32", "bfloat16"] = "float32"
    offload: Offload = "none"
    recompute: bool = False

    @property
    def kind(self) -> Literal["causal", "scalar"]:
        return CASES[self.objective].kind

    def __str__(self) -> str:
        return f"{self.objective}-zero{self.stage}-{'lora' if self.lora else 'full'}-{self.dtype}" + (
            f"-offload_{self.offload}" * (self.offload != "none") + "-recompute" * self.recompute
        )


RECOMPUTED = (("sft", 0, True), ("reward", 2, False), ("dpo", 2, True), ("policy", 3, True), ("value", 3, False))

RANK_CASES = [
    *(RankCase(name, stage, lora) for name in CASES for stage in (0, 2) for lora in (False, True)),
    *(RankCase(name, stage, lora) for name in ("sft", "policy") for stage in (1, 3) for lora in (False, True)),
    RankCase("reward", 3, False),
    *(RankCase("sft", stage, False, "bfloat16") for stage in (1, 2, 3)),
    *(RankCase("sft", stage, stage == 2, offload="optimizer") for stage in (1, 2, 3)),
    *(RankCase("policy", 3, lora, offload="parameters", recompute=not lora) for lora in (False, True)),
    RankCase("sft", 2, False, "bfloat16", offload="optimizer"),
    RankCase("sft", 3, False, "bfloat16", offload="parameters"),
    *(RankCase(name, stage, lora, recompute=True) for name, stage, lora in RECOMPUTED),
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
) -> Outcome:
    """Step on a batch and on one row of it (the second rank has none); PPO also meets an infinite advantage.

    Scoring between the steps, and standardising scores after them, must disturb nothing.
    """
    start = parameters(engine, module)
    chosen = CASES[case.objective]
    batch: Any = chosen.batch()
    steps = [engine.step(batch, chosen.objective, 1.0)]
    score(engine, module, case, max_tokens)
    steps.append(engine.step(batch.select([1]), chosen.objective, 0.5))
    if isinstance(batch, Experience | ValueBatch):
        steps.append(engine.step(poisoned(batch), chosen.objective, 1.0))
        steps.append(engine.step(batch, chosen.objective, 1.0))
    if case.kind == "scalar":
        with engine.gathered(list(module.parameters()), writable=True):
            fold_standardisation(module, 0.5, 2.0)
    scores = score(engine, module, case, max_tokens)
    return Outcome(start, [step.sums for step in steps], parameters(engine, module), scores)


def parameters(engine: TrainEngine, module: nn.Module) -> dict[str, Tensor]:
    with engine.gathered(list(module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def poisoned(batch: Experience | ValueBatch) -> Experience | ValueBatch:
    """One infinite advantage or return: it reaches one rank only, and both must skip the step."""
    column = "advantages" if isinstance(batch, Experience) else "returns"
    bad = getattr(batch, column).clone()
    bad[1, 8] = float("inf")
    return replace(batch, **{column: bad})


def score(engine: TrainEngine, module: nn.Module, case: RankCase, max_tokens: int) -> Tensor:
    """Score every row on every rank."""
    module.eval()
    function = response_logprobs if case.kind == "causal" else sequence_scores
    batch = token_batch()
    (passes,) = rank_passes(batch, max_tokens, runs_flat(module))
    return assemble([score_share(lambda part: engine.run(function, part), batch, passes)])
