"""How long a run may take on this machine: counted floating-point operations over a measured rate."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rlhf.recipe.base import Budget, DataSource, Dtype, HubData, PathData, StageData
from rlhf.recipe.online_schema import OnlineStage, PpoStage
from rlhf.recipe.preference_schema import KtoStage, PreferenceStage
from rlhf.recipe.products import cpu_products
from rlhf.recipe.resources import processes
from rlhf.recipe.schedule import row_count
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import (
    AnnotateStage,
    ClassifyStage,
    CompareStage,
    RewardStage,
    SftStage,
    Stage,
    SynthesizeStage,
)
from rlhf.recipe.tuning_schema import Full

BYTES_PER_TOKEN = 6  # of a jsonl line, its keys and quotes included
FILLED = 0.7  # of max_response_tokens, in the mean
DRAWS = 2  # instructions drawn for each that is kept
TRAINING, SCORING, GENERATING = 0.4, 0.5, 0.2  # shares of the matrix-product rate that each kind of pass reaches
PROCESS_S, STAGE_S = 12.0, 5.0
PROBE_SIZE = 1024


@dataclass(frozen=True)
class Work:
    """Tokens that go through a model: forward and backward, forward only, and one by one."""

    trained: float = 0
    scored: float = 0
    generated: float = 0


def estimate_seconds(recipe: Recipe, parameters: int, rate: float) -> float | None:
    """Return a rough duration (within a factor of two or so), or None where a data file cannot be counted.

    A token costs 2N operations forward and as many again for each of the gradients by activations and, without LoRA,
    by weights (Kaplan et al. 2020, section 2.1); `rate` is `matmul_rate`.
    """
    seconds = PROCESS_S * len(processes(recipe)) if recipe.backend == "ray" else PROCESS_S
    for stage in recipe.stages:
        work = stage_work(recipe, stage)
        if work is None:
            return None
        if recipe.budget and isinstance(stage, OnlineStage | PreferenceStage):
            work = _within(recipe.budget, work)
        passes = 6 if isinstance(getattr(stage, "tuning", None) or recipe.tuning, Full) else 4
        terms = ((work.trained, passes, TRAINING), (work.scored, 2, SCORING), (work.generated, 2, GENERATING))
        seconds += STAGE_S + sum(tokens * cost * parameters / (rate * share) for tokens, cost, share in terms)
    return seconds


def _within(budget: Budget, work: Work) -> Work:
    """Return the part of the work that the budget's token limits leave."""
    limits = ((work.trained, budget.gradient_tokens), (work.generated, budget.generated_tokens))
    share = min([1.0, *(limit / tokens for tokens, limit in limits if limit is not None and tokens)])
    return Work(share * work.trained, share * work.scored, share * work.generated)


def stage_work(recipe: Recipe, stage: Stage) -> Work | None:
    """Return the tokens of a stage, estimated from the sizes of its files."""
    match stage:
        case SynthesizeStage():
            requests = DRAWS * stage.count
            written = stage.count * (1 + DRAWS) * FILLED * stage.max_response_tokens
            return Work(0, requests * FILLED * stage.max_prompt_tokens, written)
        case SftStage():
            tokens = _data_tokens(recipe, stage.data)
            share = 0.5 if isinstance(stage.data, StageData) else 1.0  # the best sample, one side of the pair
            return None if tokens is None else Work(trained=share * tokens * stage.epochs)
        case ClassifyStage():
            tokens = _file_tokens(stage.data)
            return None if tokens is None else Work(tokens * stage.epochs, tokens * stage.heldout_fraction)
        case KtoStage():  # the reference scores the mismatches too, and the policy in every epoch
            tokens = _data_tokens(recipe, stage.data)
            return None if tokens is None else Work(tokens * stage.epochs, tokens * (2 + stage.epochs))
        case RewardStage() | PreferenceStage():
            tokens = _data_tokens(recipe, stage.data)
            return None if tokens is None else Work(tokens * stage.epochs, tokens)
        case AnnotateStage() | CompareStage():
            tokens = _file_tokens(stage.prompts)
            if tokens is None:
                return None
            rows = (row_count(stage.prompts) or 0) * stage.samples_per_prompt
            responses = rows * FILLED * stage.max_response_tokens
            if isinstance(stage, AnnotateStage):
                return Work(0, tokens, responses)
            count = len(stage.candidates)
            return Work(0, 4 * count * (tokens * stage.samples_per_prompt + responses), count * responses)
        case OnlineStage():
            return _online_work(stage)


def _online_work(stage: OnlineStage) -> Work | None:
    tokens, rows = _file_tokens(stage.prompts), row_count(stage.prompts)
    if tokens is None or not rows:
        return None
    sequences = stage.steps * stage.prompts_per_step * stage.samples_per_prompt
    responses = sequences * FILLED * stage.max_response_tokens
    total = sequences * tokens / rows + responses
    trained = 2 if isinstance(stage, PpoStage) else 1
    return Work(trained * stage.epochs * total, 5 * total, responses)


def _data_tokens(recipe: Recipe, data: DataSource) -> float | None:
    """Return the tokens of a file's rows, or of both sides of the pairs that an annotate stage may yield.

    Of a synthesize stage they are twice those of its chats: `stage_work` halves what `sft` reads from a stage.
    """
    if not isinstance(data, StageData):
        return _file_tokens(data)
    source = next(other for other in recipe.stages if other.name == data.stage)
    if isinstance(source, SynthesizeStage):
        return 2 * source.count * (1 + FILLED) * source.max_response_tokens
    assert isinstance(source, AnnotateStage)
    tokens = _file_tokens(source.prompts)
    if tokens is None:
        return None
    return 2 * (tokens + (row_count(source.prompts) or 0) * FILLED * source.max_response_tokens)


def _file_tokens(data: PathData | HubData) -> float | None:
    rows = row_count(data)
    if rows is None or isinstance(data, HubData):
        return None
    lines = [line for line in data.path.read_bytes().splitlines() if line.strip()][:rows]
    return sum(map(len, lines)) / BYTES_PER_TOKEN


def matmul_rate(dtype: Dtype, on_gpu: bool) -> float:
    """Return the floating-point operations per second of matrix products here: on the CPU those that are kept."""
    if not on_gpu:
        return cpu_products().rate(dtype)
    import torch

    matrix = torch.randn(PROBE_SIZE, PROBE_SIZE, device="cuda").to(getattr(torch, dtype))
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * PROBE_SIZE**3 / best
