"""How fast models learn here, by the code that runs use: real tokens per second, and their share of the limit."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rlhf.bench.batches import Drawer
from rlhf.bench.ceilings import Place, flops, laps
from rlhf.bench.figures import Figure
from rlhf.bench.setting import LearnerKind, Setting
from rlhf.bench.work import Cost, Work
from rlhf.engines.base import LearnerSpec, Objective
from rlhf.engines.learner import ModelLearner
from rlhf.engines.objectives import RewardModel, Sft
from rlhf.engines.preference_objectives import Preference
from rlhf.models.tuning import unwrapped
from rlhf.recipe.schedule import pass_tokens
from rlhf.types import Experience, PreferenceBatch, TokenBatch

ROWS = {"cpu": 16, "cuda": 128}
"""Sequences of one optimizer step; half as many pairs."""

STEPS_S = 4.0


def measure_learner(kind: LearnerKind, setting: Setting, known: Sequence[Figure]) -> list[Figure]:
    """Return real tokens per second of optimizer steps on one rank with its own threads, the first one left out.

    Tokens are those of both sides of a pair with their prompts, as the token budget of a recipe counts them. The limit
    is the time of the useful operations (`rlhf.bench.work`) at the measured rate of matrix products in the model's
    dtype:

        limit = tokens / ((forward + backward) / rate), fraction = (forward + backward) / seconds / rate

    Reading and writing the optimizer's state is no part of the limit.
    """
    learner = ModelLearner(learner_spec(kind, setting))
    place = Place("cuda" if learner.device.type == "cuda" else "cpu", setting.threads(kind))
    config = unwrapped(learner.model).config.get_text_config()
    batch, objective = task(kind, setting, Drawer(config.vocab_size, config.max_position_embeddings), place)
    rows = [list(range(len(batch)))]
    seconds = statistics.median(
        laps(lambda: learner.train(batch, objective, rows, 1.0), place, STEPS_S * setting.seconds, least=2)
    )
    tokens, limit = batch.token_count(), None
    cost, rate = Cost.of(learner.model), flops(known, setting.recipe.model.precision, place)
    if cost and rate:
        work = useful(kind, batch)
        limit = tokens * rate / (cost.forward(work) + cost.backward(work))
    learner.close()
    return [Figure(kind, tokens / seconds, str(place), limit)]


def learner_spec(kind: LearnerKind, setting: Setting) -> LearnerSpec:
    """Return one rank of the role that a stage trains, as the recipe has it, all its state on the device."""
    stage: Any = setting.stage(kind)
    role = "reward" if kind == "reward" else "policy"
    return LearnerSpec(
        role=role,  # type: ignore[arg-type]
        kind="scalar" if kind == "reward" else "causal",
        checkpoint=setting.folder,
        dtype=setting.recipe.model.precision,
        tuning=stage.tuning or setting.recipe.tuning,
        optimizer=stage.optimizer,
        head_learning_rate=getattr(stage, "head_learning_rate", None),
        max_tokens_per_microbatch=pass_tokens(setting.recipe, stage),
        temperature=getattr(stage, "temperature", 1.0),
        threads=setting.threads(kind),
        seed=setting.recipe.seed,
        gradient_checkpointing=getattr(setting.recipe.roles, role).gradient_checkpointing,
    )


def task(kind: LearnerKind, setting: Setting, drawer: Drawer, place: Place) -> tuple[Any, Objective[Any]]:
    """Return a batch and the loss that a stage of this kind has, with the stage's settings."""
    from rlhf.stages.policy_gradient import objective
    from rlhf.stages.preference import pair_loss

    rows, stage = ROWS[place.device], setting.stage(kind)
    match stage.kind:
        case "sft":
            return drawer.sequences(rows), Sft()
        case "dpo":
            return drawer.pairs(rows // 2), Preference(pair_loss(stage))
        case "reward":
            return drawer.pairs(rows // 2), RewardModel()
        case "ppo":
            return drawer.experience(rows), objective(stage, stage.kl_coef)
    raise TypeError(stage.kind)


def useful(kind: LearnerKind, batch: Any) -> Work:
    """Return what a step cannot do without: the head at the response tokens, or once a sequence for the reward."""
    match batch:
        case PreferenceBatch():
            sequences = TokenBatch.stack([batch.chosen, batch.rejected])
        case Experience():
            sequences = batch.batch
        case _:
            sequences = batch
    return Work.of(sequences, len(sequences) if kind == "reward" else int(sequences.response_mask.sum()))
