"""Training on a GPU: DeepSpeed in bfloat16 against plain torch, what offload frees, and the memory model."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import random_tokens

from rlhf.engines.base import LearnerSpec
from rlhf.engines.learner import ModelLearner
from rlhf.engines.objectives import Sft
from rlhf.engines.shares import token_scores
from rlhf.recipe.activations import Pass
from rlhf.recipe.base import Optimizer
from rlhf.recipe.memory import Cut, learner_memory
from rlhf.recipe.model_shape import Model, read_shape
from rlhf.recipe.tuning_schema import Full, Lora, Tuning
from rlhf.types import TokenBatch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROWS, WIDTH = 16, 512
Build = Callable[[LearnerSpec], ModelLearner]


@pytest.fixture
def build() -> Iterator[Build]:
    """Build learners that are closed after the test, with nothing left on the device."""
    made: list[ModelLearner] = []

    def one(spec: LearnerSpec) -> ModelLearner:
        made.append(ModelLearner(spec))
        return made[-1]

    yield one
    while made:
        made.pop().close()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def spec(gpu_folder: Path) -> LearnerSpec:
    return LearnerSpec(
        role="policy",
        kind="causal",
        checkpoint=gpu_folder,
        dtype="bfloat16",
        tuning=Full(),
        optimizer=Optimizer(learning_rate=1e-4, schedule="constant"),
        head_learning_rate=None,
        max_tokens_per_microbatch=ROWS * WIDTH // 4,
        temperature=1.0,
        threads=4,
        seed=3,
    )


def batch() -> TokenBatch:
    return random_tokens(7, [WIDTH - 16 * row for row in range(ROWS)], [32] * ROWS)


def weights(learner: ModelLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.float().cpu().clone() for name, tensor in learner.weights()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_deepspeed_in_bfloat16_steps_like_plain_torch(spec: LearnerSpec, build: Build, zero_stage: int) -> None:
    plain = build(spec)
    before = weights(plain)
    expected = [plain.train(batch(), Sft(), [range(ROWS)], 1.0)["loss"] for _ in range(3)]
    after = weights(plain)
    plain.close()
    cut = build(replace(spec, offload="optimizer", zero_stage=zero_stage))  # type: ignore[arg-type]
    found = [cut.train(batch(), Sft(), [range(ROWS)], 1.0)["loss"] for _ in range(3)]
    assert found == pytest.approx(expected, rel=2e-2)
    assert distance(weights(cut), after) < 0.05 * distance(after, before)


def test_logprobs_are_those_of_float32_but_for_rounding(spec: LearnerSpec, build: Build) -> None:
    frozen = replace(spec, optimizer=None)
    short, exact = build(frozen), build(replace(frozen, dtype="float32"))
    gap = (token_scores([short.logprobs(batch())]).logprobs - token_scores([exact.logprobs(batch())]).logprobs).abs()
    assert 0 < gap[batch().response_mask].mean() < 0.05


@pytest.mark.parametrize("deepspeed", [False, True])
def test_offload_frees_the_device_and_reload_changes_nothing(spec: LearnerSpec, build: Build, deepspeed: bool) -> None:
    if deepspeed:
        spec = replace(spec, offload="optimizer", zero_stage=3)
    learner = build(spec)
    learner.train(batch(), Sft(), [range(ROWS)], 1.0)
    torch.cuda.synchronize()
    held, before = torch.cuda.memory_allocated(), weights(learner)
    learner.offload()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < 0.1 * held
    learner.reload()
    assert distance(weights(learner), before) == 0
    assert learner.train(batch(), Sft(), [range(ROWS)], 1.0)["skipped_steps"] == 0


@pytest.mark.parametrize("tuning", [Full(), Lora(r=16)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_memory_model_is_right_within_a_fifth(
    spec: LearnerSpec, build: Build, tuning: Tuning, checkpointing: bool
) -> None:
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    learner = build(replace(spec, tuning=tuning, gradient_checkpointing=checkpointing))
    rows = random_tokens(7, [WIDTH] * ROWS, [32] * ROWS)
    for _ in range(2):
        learner.train(rows, Sft(), [range(ROWS)], 1.0)
    measured = torch.cuda.max_memory_allocated() - base
    model = Model(read_shape(spec.checkpoint), "bfloat16", scalar=False, tuning=tuning)
    tokens = spec.max_tokens_per_microbatch
    work = Pass(tokens, WIDTH, tokens // WIDTH * (WIDTH - 32), passes=4, masked=False)
    learn = learner_memory(model, work, Cut(1, checkpointing=checkpointing), on_gpu=True).learn
    assert learn.total - learn.slack == pytest.approx(measured, rel=0.2)
