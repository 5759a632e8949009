"""What `ModelLearner` does on one rank and on two, to be compared: one round of every call."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engine_cases import CASES, HEAD_RATE, OPTIMIZER, token_batch, value_batch
from safetensors.torch import load_file
from torch import Tensor

from rlhf.engines.base import LearnerSpec
from rlhf.engines.learner import ModelLearner
from rlhf.engines.offloading import Parked, tensors_of
from rlhf.engines.shares import Part
from rlhf.recipe.role_schema import ZeroStage
from rlhf.recipe.tuning_schema import (
    Full,
    Ia3,
    Layers,
    LlamaAdapter,
    Lora,
    PrefixTuning,
    PTuning,
    Qlora,
    Tuning,
)
from rlhf.recipe.tuning_support import support

CPU = torch.device("cpu")
MAX_TOKENS = 24
BUCKET = 80_000
"""Bytes: a few of the model's matrices, the largest of which has 67,072."""


TUNINGS: dict[str, Tuning] = {
    "full": Full(),
    "lora": Lora(r=4, alpha=8),
    "dora": Lora(r=4, dora=True),
    "qlora": Qlora(r=4),
    "ia3": Ia3(),
    "llama_adapter": LlamaAdapter(tokens=4),
    "prefix_tuning": PrefixTuning(virtual_tokens=3),
    "p_tuning": PTuning(virtual_tokens=3, encoder_size=12),
    "layers": Layers(last=1),
}
OTHERS = [name for name in TUNINGS if name not in ("full", "lora")]


@dataclass(frozen=True)
class LearnerCase:
    """`park` empties every tensor between two steps and fills it again; `whole` keeps small parameters uncut."""

    objective: str
    stage: ZeroStage
    tuning: str = "full"
    frozen: bool = False
    park: bool = False
    whole: bool = False

    def __str__(self) -> str:
        marks = [name for name in ("frozen", "park", "whole") if getattr(self, name)]
        return "-".join([f"{self.objective}-zero{self.stage}-{self.tuning}", *marks])

    def spec(self, folder: Path, ranks: int) -> LearnerSpec:
        return LearnerSpec(
            role="policy",
            kind=CASES[self.objective].kind,
            checkpoint=folder,
            dtype="float32",
            tuning=None if self.frozen else TUNINGS[self.tuning],
            optimizer=None if self.frozen else OPTIMIZER,
            head_learning_rate=HEAD_RATE,
            max_tokens_per_microbatch=MAX_TOKENS if ranks > 1 else 10**6,
            temperature=0.9,
            threads=1,
            seed=1,
            ranks=ranks,
            zero_stage=self.stage,
        )


PARKED: list[tuple[ZeroStage, str]] = [(0, "full"), (1, "full"), (2, "lora"), (3, "full"), (3, "lora")]

LEARNER_CASES = [
    LearnerCase("sft", 0, "lora"),
    *(LearnerCase("sft", stage, tuning, park=park) for stage, tuning in PARKED for park in (False, True)),
    LearnerCase("value", 0),
    LearnerCase("value", 2, "lora"),
    LearnerCase("value", 3),
    LearnerCase("reward", 2),
    LearnerCase("reward", 3),
    LearnerCase("reward", 3, "lora", whole=True),
    *(LearnerCase(name, stage, frozen=True) for name in ("sft", "reward") for stage in (2, 3)),
    *(LearnerCase("sft", 3 if support(TUNINGS[name]).cut else 2, name) for name in OTHERS),
    LearnerCase("reward", 3, "prefix_tuning"),
]


@dataclass(frozen=True)
class Round:
    """The answers of one rank. `most_whole` is the largest number of bytes whole at once while weights were read."""

    trained: dict[str, tuple[float, float]]
    evaluated: dict[str, tuple[float, float]]
    parts: dict[str, Part]
    weights: dict[str, Tensor]
    adapter: dict[str, Tensor]
    saved: dict[str, Tensor]
    most_whole: int
    whole_after: int


def go_round(case: LearnerCase, folder: Path, ranks: int, target: Path) -> Round:
    """Train twice, evaluate, fit and score, standardise a scalar, read and save the weights."""
    learner = ModelLearner(case.spec(folder, ranks))
    chosen = CASES[case.objective]
    batch: Any = chosen.batch()
    trained = {} if case.frozen else learner.train(batch, chosen.objective, [[3, 0, 4], [2]], 1.0).sums
    if case.park:
        park(learner)
    if not case.frozen:
        trained = trained | learner.train(batch, chosen.objective, [list(range(len(batch)))], 0.5).sums
    evaluated = learner.evaluate(batch, chosen.objective).sums
    parts = ask(learner, case)
    whole = Whole(learner)
    able = support(TUNINGS[case.tuning])
    weights = copies(learner.weights, whole) if able.merges else {}
    adapter = copies(learner.adapter_weights, whole) if able.adapter and not case.frozen else {}
    saved = {}
    if able.merges:
        learner.save(target)
        saved = load_file(target / "model.safetensors") if learner.rank == 0 else {}
    found = Round(trained, evaluated, parts, weights, adapter, saved, whole.most, whole.bytes())
    learner.close()
    return found


def ask(learner: ModelLearner, case: LearnerCase) -> dict[str, Part]:
    """Return the parts of every kind of score; a batch of one row leaves the second rank with none."""
    batch = token_batch()
    if learner.spec.kind == "causal":
        found = {"policy": learner.logprobs(batch), "one": learner.logprobs(batch.select([1]))}
        return found | ({"base": learner.logprobs(batch, "base")} if support(TUNINGS[case.tuning]).reference else {})
    found = {"fitted": learner.fit_values(value_batch())} if case.objective == "value" else {}
    found |= {"scores": learner.scores(batch), "values": learner.values(batch)}
    if not case.frozen:
        learner.standardise(0.5, 2.0)
    return found | {"standardised": learner.scores(batch)}


def park(learner: ModelLearner) -> None:
    """Empty the memory of the model, its gradients and its optimizer, and bring it back."""
    assert learner.engine is not None
    roots = [learner.model, *learner.engine.holdings()]
    for parameter in learner.model.parameters():
        if not parameter.untyped_storage().resizable():  # the mapped file, which no accelerator has
            parameter.data = parameter.data.clone()
    size = sum(storage_bytes(tensor) for tensor in distinct(roots))
    parked = Parked(roots, CPU)
    assert parked.bytes == size > 0
    assert not list(tensors_of(roots, CPU))
    assert all(storage_bytes(tensor) == 0 for tensor in learner.model.parameters())
    parked.reload()
    assert sum(storage_bytes(tensor) for tensor in distinct(roots)) == size


def distinct(roots: list[object]) -> list[Tensor]:
    """One tensor of each storage."""
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_of(roots, CPU)}.values())


def storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


class Whole:
    """Watches how many bytes of parameters this rank has whole."""

    def __init__(self, learner: ModelLearner) -> None:
        self.parameters = list(learner.model.parameters())
        self.most = 0

    def bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters)

    def look(self) -> None:
        self.most = max(self.most, self.bytes())


def copies(weights: Callable[[], Any], whole: Whole) -> dict[str, Tensor]:
    """Copies, since a tensor is good until the next one is asked for."""
    found = {}
    for name, tensor in weights():
        whole.look()
        found[name] = tensor.detach().clone()
    return found
