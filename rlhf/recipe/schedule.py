"""How much work each stage is, from the recipe and the lines of its data files."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlhf.recipe.base import HubData, PathData, StageData
from rlhf.recipe.online_schema import OnlineDpoStage, OnlineStage
from rlhf.recipe.preference_schema import KtoStage, PreferenceStage
from rlhf.recipe.resources import on_gpu, visible_gpus, wanted
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

Schedule = Mapping[str, int]

GPU_PASS, CPU_PASS = 4096, 1024
"""Tokens that go through a model at once. On 2 cores DPO in float32 takes 1.3 times as long with 512, 1.1 with 4096."""

FEWEST_ROWS = 20
"""An SFT stage with fewer rows trains on all of them."""


def schedule(recipe: Recipe, stage: Stage) -> Schedule:
    """Return named counts: rows, optimizer steps, rollouts, the most tokens of one sequence.

    A count that needs a file which is not local jsonl is left out. What an annotate stage will yield is not
    known before it has run, so counts that hang on it are upper bounds and end in `_at_most`. Rows are held out by
    prompt or class, so where prompts repeat or classes are small, steps may be a few more or less.
    """
    match stage:
        case KtoStage():
            return _labelled(recipe, stage)
        case ClassifyStage():
            texts = row_count(stage.data)
            learned = None if texts is None else texts - round(texts * stage.heldout_fraction)
            return _rows(stage.data) | _steps(stage, learned, "")
        case SftStage() if (rows := _written(recipe, stage)) is not None:
            return {"rows": rows} | _steps(stage, rows - sft_heldout(stage, rows), "")
        case SftStage() | RewardStage() | PreferenceStage():
            if isinstance(stage.data, StageData):
                pairs = _pairs(recipe, stage.data.stage)
                known = {} if pairs is None else {"pairs_at_most": pairs}
                return known | _steps(stage, pairs, "_at_most")
            pairs = row_count(stage.data)
            if pairs is None or not (isinstance(stage, SftStage) or _is_pair_a_row(stage.data)):
                trained = None
            elif isinstance(stage, SftStage):
                trained = pairs - sft_heldout(stage, pairs)
            else:
                trained = pairs - round(pairs * stage.heldout_fraction)
            return _rows(stage.data) | _steps(stage, trained, "")
        case AnnotateStage():
            prompts = row_count(stage.prompts)
            return _rows(stage.prompts, "prompts") | _sampling(stage, prompts, stage.samples_per_prompt)
        case SynthesizeStage():
            return _rows(stage.seeds, "seeds") | {"rows": stage.count, "max_tokens": sequence_tokens(stage)}
        case OnlineStage():
            return _rows(stage.prompts, "prompts") | _online(stage)
        case CompareStage():
            prompts = row_count(stage.prompts)
            samples = stage.samples_per_prompt * len(stage.candidates)
            return _rows(stage.prompts, "prompts") | _sampling(stage, prompts, samples)


def row_count(data: PathData | HubData) -> int | None:
    """Return the rows a stage reads: the non-blank lines of a local jsonl file, at most `limit`; else None."""
    if isinstance(data, HubData) or data.path.suffix.lower() != ".jsonl":
        return None
    with data.path.open("rb") as file:
        rows = sum(bool(line.strip()) for line in file)
    return rows if data.limit is None else min(rows, data.limit)


def sft_heldout(stage: SftStage, rows: int) -> int:
    """Return how many of its rows an SFT stage holds out: a share, one at least, but none of fewer than 20."""
    if stage.heldout_fraction == 0 or rows < FEWEST_ROWS:
        return 0
    return max(1, round(stage.heldout_fraction * rows))


def longest(recipe: Recipe) -> int:
    """Return the most tokens, prompt and response, that the rollout engine sees in any stage; 0 without one."""
    return max(sequence_tokens(stage) for stage in recipe.stages)


def sequence_tokens(stage: StageBase) -> int:
    """Return the most tokens, prompt and response, that a stage gives the rollout engine; 0 where it uses none."""
    if isinstance(stage, AnnotateStage | SynthesizeStage | OnlineStage | CompareStage):
        return stage.max_prompt_tokens + stage.max_response_tokens
    return 0


def pass_tokens(recipe: Recipe, stage: Stage) -> int:
    """Return the tokens that may go through a model at once: the stage's own, or what suits the device."""
    if stage.max_tokens_per_microbatch is not None:
        return stage.max_tokens_per_microbatch
    models = [role for name, role in wanted(recipe, stage).items() if name not in ("rollout", "judge")]
    visible = recipe.backend == "local" and visible_gpus() > 0
    return GPU_PASS if any(on_gpu(recipe, role, visible) for role in models) else CPU_PASS


def row_tokens(stage: Stage) -> int:
    """Return the most tokens of one row that a model of the stage trains on or scores."""
    return stage.max_length if isinstance(stage, Training) else sequence_tokens(stage)


def step_rows(recipe: Recipe, stage: Stage) -> int:
    """Return the rows, both sides of each pair, of one optimizer step over all ranks; of a stage without, of a pass."""
    match stage:
        case SftStage() | ClassifyStage() | KtoStage():
            return stage.batch_size
        case RewardStage() | PreferenceStage():
            return 2 * stage.batch_size
        case OnlineStage():
            return stage.minibatch_size * (2 if isinstance(stage, OnlineDpoStage) else 1)
        case _:
            return max(1, pass_tokens(recipe, stage) // sequence_tokens(stage))


def microbatch_tokens(recipe: Recipe, stage: Stage, ranks: int = 1) -> int:
    """Return the most tokens of one forward or backward pass of a rank; a row over the budget passes alone."""
    budget = pass_tokens(recipe, stage)
    match stage:
        case SftStage() | ClassifyStage() | KtoStage():
            row, rows = stage.max_length, stage.batch_size
        case RewardStage() | PreferenceStage():
            row, rows = 2 * stage.max_length, stage.batch_size
        case OnlineStage():
            row, rows = sequence_tokens(stage), stage.prompts_per_step * stage.samples_per_prompt
        case _:
            return max(sequence_tokens(stage), budget)
    return max(row, min(row * math.ceil(rows / ranks), budget))


def _rows(data: PathData | HubData, name: str = "rows") -> dict[str, int]:
    rows = row_count(data)
    return {} if rows is None else {name: rows}


def _steps(stage: Training, rows: int | None, ending: str) -> dict[str, int]:
    known = {} if rows is None else {f"optimizer_steps{ending}": stage.epochs * math.ceil(rows / stage.batch_size)}
    return {**known, "batch_size": stage.batch_size, "max_tokens": stage.max_length}


def _labelled(recipe: Recipe, stage: KtoStage) -> dict[str, int]:
    """Return the counts of responses with a label: two of each pair; a file of unnamed format may hold either."""
    if isinstance(stage.data, StageData):
        pairs = _pairs(recipe, stage.data.stage)
        known = {} if pairs is None else {"pairs_at_most": pairs}
        return known | _steps(stage, None if pairs is None else 2 * pairs, "_at_most")
    rows = row_count(stage.data)
    each = {"preference": 2, "kto": 1}.get(stage.data.format)
    trained = None if rows is None or each is None else each * (rows - round(rows * stage.heldout_fraction))
    return _rows(stage.data) | _steps(stage, trained, "")


def _is_pair_a_row(data: PathData | HubData) -> bool:
    """Return whether each row of a jsonl file is one pair: not so of rankings, and of UltraFeedback as published."""
    if data.format != "auto" or isinstance(data, HubData):
        return data.format in ("auto", "preference", "hh_rlhf")
    with data.path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"")
    return not any(name in first for name in (b'"responses"', b'"completions"', b'"ranking"'))


def _written(recipe: Recipe, stage: SftStage) -> int | None:
    """Return the chats that the synthesize stage writes on which the stage trains; None where it trains on others."""
    name = stage.data.stage if isinstance(stage.data, StageData) else None
    source = next((other for other in recipe.stages if other.name == name), None)
    return source.count if isinstance(source, SynthesizeStage) else None


def _pairs(recipe: Recipe, name: str) -> int | None:
    """Return the most pairs that the annotate stage can yield, held-out ones included."""
    stage = next(stage for stage in recipe.stages if stage.name == name)
    assert isinstance(stage, AnnotateStage)
    prompts = row_count(stage.prompts)
    each = 1 if stage.pairing == "best_worst" else math.comb(stage.samples_per_prompt, 2)
    return None if prompts is None else prompts * each


def _sampling(stage: AnnotateStage | CompareStage, prompts: int | None, samples: int) -> dict[str, int]:
    known = {} if prompts is None else {"rollouts": prompts * samples}
    return {**known, "max_tokens": sequence_tokens(stage)}


def _online(stage: OnlineStage) -> dict[str, int]:
    sequences = stage.prompts_per_step * stage.samples_per_prompt
    trained = stage.prompts_per_step if isinstance(stage, OnlineDpoStage) else sequences
    minibatches = math.ceil(trained / stage.minibatch_size)
    return {
        "steps": stage.steps,
        "sequences_per_step": sequences,
        "minibatches_per_epoch": minibatches,
        "optimizer_steps_per_step": stage.epochs * minibatches,
        "optimizer_steps": stage.steps * stage.epochs * minibatches,
        "rollouts": stage.steps * sequences,
        "max_tokens": sequence_tokens(stage),
    }
