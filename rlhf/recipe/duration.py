"""How long a run may take on this machine: counted floating-point operations over a measured rate."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

from rlhf.recipe.base import Budget, Dtype, HubData, ModelJudge, StageData
from rlhf.recipe.model_shape import ModelShape
from rlhf.recipe.online_schema import OnlineStage, PpoStage
from rlhf.recipe.preference_schema import KtoStage, PreferenceStage
from rlhf.recipe.products import cpu_products
from rlhf.recipe.resources import processes
from rlhf.recipe.row_lengths import Measured
from rlhf.recipe.schedule import row_count, schedule
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_base import StageBase, Training
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

BYTES_PER_TOKEN = 6  # of a jsonl line whose tokens were not counted, its keys and quotes included
FILLED = 0.7  # of max_response_tokens, in the mean
DRAWS = 2  # instructions drawn for each that is kept
TRAINING, SCORING, GENERATING = 0.45, 0.6, 0.35
"""Shares of the rate of matrix products that each kind of pass reaches.

Chosen so that two runs of recipes/quickstart.yaml on 2 cores, 674 s in float32 and 444 s in bfloat16, are met within a
tenth, and each of their stages within a quarter.
"""
PROCESS_S, STAGE_S, STEP_S = 12.0, 8.0, 0.05
"""Starting a process, libraries included, and what a stage and an optimizer step take beside their passes."""
PROBE_SIZE = 1024


@dataclass(frozen=True)
class Work:
    """Tokens that go through a model: forward and backward, forward only, and one by one.

    Of those trained and scored, `trained_words` and `scored_words` go through the language-model head too.
    """

    trained: float = 0
    scored: float = 0
    generated: float = 0
    trained_words: float = 0
    scored_words: float = 0

    def times(self, share: float) -> Work:
        """Return so many times the work."""
        return Work(*(share * getattr(self, field.name) for field in fields(self)))


def estimate_seconds(recipe: Recipe, shape: ModelShape, rate: float, measured: Measured) -> float | None:
    """Return a rough duration, or None where a data file cannot be counted; `measured` are the lengths of its rows."""
    seconds = PROCESS_S * len(processes(recipe)) if recipe.backend == "ray" else PROCESS_S
    for stage in recipe.stages:
        taken = stage_seconds(recipe, stage, shape, rate, measured)
        if taken is None:
            return None
        seconds += taken
    return seconds


def stage_seconds(recipe: Recipe, stage: Stage, shape: ModelShape, rate: float, measured: Measured) -> float | None:
    """Return a rough duration of a stage whose processes are there, or None where its data cannot be counted.

    A token costs 2N operations forward and as many again for each of the gradients by activations and, without LoRA,
    by weights (Kaplan et al. 2020, section 2.1), N being the weights that it meets: those of the layers, and of the
    head where it is asked. `rate` is `matmul_rate`.
    """
    work = stage_work(recipe, stage, measured)
    if work is None:
        return None
    if recipe.budget and isinstance(stage, OnlineStage | PreferenceStage):
        work = _within(recipe.budget, work)
    head = shape.vocabulary * shape.hidden
    body = shape.parameters - head - shape.lm_head
    passes = 6 if isinstance(getattr(stage, "tuning", None) or recipe.tuning, Full) else 4
    trained = passes * (work.trained * body + work.trained_words * head) / TRAINING
    scored = 2 * (work.scored * body + work.scored_words * head) / SCORING
    generated = 2 * work.generated * (body + head) / GENERATING
    counts = schedule(recipe, stage)
    steps = counts.get("optimizer_steps", counts.get("optimizer_steps_at_most", 0))
    return STAGE_S + STEP_S * steps + (trained + scored + generated) / rate


def _within(budget: Budget, work: Work) -> Work:
    """Return the part of the work that the budget's token limits leave."""
    limits = ((work.trained, budget.gradient_tokens), (work.generated, budget.generated_tokens))
    return work.times(min([1.0, *(limit / tokens for tokens, limit in limits if limit is not None and tokens)]))


def stage_work(recipe: Recipe, stage: Stage, measured: Measured) -> Work | None:
    """Return the tokens of a stage, from the lengths or the sizes of its files."""
    match stage:
        case SynthesizeStage():
            requests = DRAWS * stage.count
            written = stage.count * (1 + DRAWS) * FILLED * stage.max_response_tokens
            return Work(0, requests * FILLED * stage.max_prompt_tokens, written)
        case AnnotateStage() | CompareStage():
            return _sampling_work(stage, measured)
        case OnlineStage():
            return _online_work(recipe, stage, measured)
    data = _data(recipe, stage, measured)
    if data is None:
        return None
    tokens, words = data
    epochs = stage.epochs
    match stage:
        case SftStage():
            return Work(trained=tokens * epochs, trained_words=words * epochs)
        case ClassifyStage():
            return Work(tokens * epochs, tokens * stage.heldout_fraction)
        case RewardStage():  # all are scored at the end, to standardise the scores
            return Work(tokens * epochs, tokens)
        case KtoStage():  # the reference scores the mismatches too, and the policy in every epoch
            return Work(tokens * epochs, tokens * (2 + epochs), 0, words * epochs, words * (2 + epochs))
        case PreferenceStage():
            return Work(tokens * epochs, tokens, 0, words * epochs, words)
    raise TypeError(stage.kind)


def _sampling_work(stage: AnnotateStage | CompareStage, measured: Measured) -> Work | None:
    tokens, rows = _file_tokens(stage, "prompts", measured), row_count(stage.prompts)
    if tokens is None or not rows:
        return None
    responses = rows * stage.samples_per_prompt * FILLED * stage.max_response_tokens
    judged = tokens * stage.samples_per_prompt + responses
    if isinstance(stage, AnnotateStage):
        return Work(0, tokens + (judged if isinstance(stage.judge, ModelJudge) else 0), responses)
    asked = 2 + isinstance(stage.reward, ModelJudge)  # the candidate, the baseline and the reward model
    count = len(stage.candidates)
    return Work(0, asked * count * judged, count * responses, 0, 2 * count * responses)


def _online_work(recipe: Recipe, stage: OnlineStage, measured: Measured) -> Work | None:
    tokens, rows = _file_tokens(stage, "prompts", measured), row_count(stage.prompts)
    if tokens is None or not rows:
        return None
    sequences = stage.steps * stage.prompts_per_step * stage.samples_per_prompt
    responses = sequences * FILLED * stage.max_response_tokens
    total = sequences * tokens / rows + responses
    critic = isinstance(stage, PpoStage)
    scalars = critic + isinstance(stage.reward, ModelJudge)
    epochs = stage.epochs
    return Work((1 + critic) * epochs * total, (2 + scalars) * total, responses, epochs * responses, 2 * responses)


def _data(recipe: Recipe, stage: Training, measured: Measured) -> tuple[float, float] | None:
    """Return the tokens that one epoch takes through a model, and those of the answers among them.

    Of the pairs that an annotate stage may yield a prompt counts once; `sft` reads the better half.
    """
    data = stage.data  # type: ignore[attr-defined]
    if not isinstance(data, StageData):
        tokens = _file_tokens(stage, "data", measured)
        return None if tokens is None else (tokens, tokens / 2)
    source = next(other for other in recipe.stages if other.name == data.stage)
    if isinstance(source, SynthesizeStage):
        written = source.count * FILLED * source.max_response_tokens
        return source.count * source.max_response_tokens + written, written
    assert isinstance(source, AnnotateStage)
    tokens = _file_tokens(source, "prompts", measured)
    if tokens is None:
        return None
    answers = (row_count(source.prompts) or 0) * FILLED * source.max_response_tokens
    both = 1 if isinstance(stage, SftStage) else 2
    return tokens + both * answers, both * answers


def _file_tokens(stage: StageBase, key: str, measured: Measured) -> float | None:
    """Return the tokens of the rows of a stage's file, each through a model once."""
    data = getattr(stage, key)
    rows = row_count(data)
    if rows is None or isinstance(data, HubData):
        return None
    if found := measured.get(f"stages.{stage.name}.{key}"):
        return rows * found.mean
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
