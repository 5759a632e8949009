"""What every role of a stage holds in each phase of a step, on each GPU: who sleeps, who stays, who is at work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from rlhf.recipe.activations import Pass
from rlhf.recipe.base import LlmJudge
from rlhf.recipe.devices import Device
from rlhf.recipe.engine_memory import EngineMemory, engine_memory
from rlhf.recipe.memory import CONTEXT, Cut, LearnerMemory, Memory, learner_memory
from rlhf.recipe.model_shape import Model, ModelShape
from rlhf.recipe.online_schema import OnlineStage, PpoStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.resources import Wanted, wanted
from rlhf.recipe.role_schema import ModelRole, RoleName, RolloutRole, TrainedRole
from rlhf.recipe.schedule import longest, microbatch_tokens, row_tokens, step_rows
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import (
    AnnotateStage,
    ClassifyStage,
    CompareStage,
    RewardStage,
    SftStage,
    Stage,
    SynthesizeStage,
    judges,
)

Phase = Literal["generate", "score", "learn", "publish"]
PHASES: tuple[Phase, ...] = get_args(Phase)
BUCKET = 1 << 30
"""Bytes of weights at most on their way to the engine at once."""
FIT = 10 * 8
"""Bytes for each pair of hidden units while a critic's head is fitted: moments of five folds, and what solves them."""


@dataclass(frozen=True)
class RoleMemory:
    """A role in a stage: each process's (of an engine: each GPU's) memory by phase; `host` is beside it, offloaded."""

    model: Model
    phases: Mapping[Phase, Memory]
    host: int = 0
    engine: EngineMemory | None = None

    @property
    def peak(self) -> Phase:
        """The phase in which it is largest."""
        return max(self.phases, key=lambda phase: self.phases[phase].total)


def stage_phases(stage: Stage) -> tuple[Phase, ...]:
    """Return the phases of a stage, in order."""
    match stage:
        case OnlineStage():
            return PHASES
        case AnnotateStage() | CompareStage():
            return ("generate", "score")
        case SynthesizeStage():
            return ("generate",)
        case SftStage():
            return ("learn",)
        case _:
            return ("score", "learn")


def stage_memory(
    recipe: Recipe,
    stage: Stage,
    shape: ModelShape,
    judge: ModelShape | None,
    device: Device | None,
    real: Recipe | None = None,
) -> dict[RoleName, RoleMemory]:
    """Estimate every role of a stage; `judge` is the shape of a language model that judges here.

    `real` is the recipe with its limits lowered to the rows of its data (`narrowed`); without it all rows are as long
    as allowed.

    Where the rollout engine shares the policy's GPUs they take turns: the policy leaves them while it generates, and
    the engine drops weights and KV cache while others work; to be published to, it wakes its weights alone. On GPUs of
    an unknown kind the engine's KV cache is what its sequences need.
    """
    phases = stage_phases(stage)
    rows = next((other for other in real.stages if other.name == stage.name), stage) if real else stage
    found: dict[RoleName, RoleMemory] = {}
    for name, want in wanted(recipe, stage).items():
        shown = judge if name == "judge" and judge else shape
        model = role_model(recipe, stage, name, shown)
        here = device if want.gpus else None
        role = getattr(recipe.roles, name)
        if isinstance(role, RolloutRole):
            judging = name == "judge"
            length = _judge(stage).max_prompt_tokens + 1 if judging else longest(recipe)
            usual = None if judging or real is None else longest(real)
            engine = engine_memory(shown, recipe.model.precision, role, length, here, usual)
            if want.gpus and device is None:
                engine = replace(engine, awake=replace(engine.awake, kv_cache=engine.needed), room=engine.needed)
            held = {phase: _engine_phase(engine, phase, want) for phase in phases}
            found[name] = RoleMemory(model, held, engine=engine)
        else:
            memory = role_memory(recipe, stage if want.gpus else rows, model, role, want)
            if name == "critic" and isinstance(stage, PpoStage) and stage.critic_start == "fitted":
                memory = replace(memory, score=memory.score.plus(Memory(buffers=FIT * shape.hidden**2)))
            turns = name == "policy" and bool(want.gpus) and recipe.roles.rollout.share == "policy"
            held = {phase: _learner_phase(memory, phase, want, turns, name == "policy") for phase in phases}
            found[name] = RoleMemory(model, held, memory.host)
    return found


def role_memory(recipe: Recipe, stage: Stage, model: Model, role: ModelRole, want: Wanted) -> LearnerMemory:
    """Return what each process of a role that scores or learns holds; a pass that learns has a step's rows at most."""
    work, cut = role_pass(recipe, stage, want.count), role_cut(role, want)
    memory = learner_memory(model, work, cut, bool(want.gpus))
    rows = math.ceil(step_rows(recipe, stage) / want.count)
    fewer = min(work.tokens, max(1, rows) * work.width)
    if not model.trained or fewer == work.tokens:
        return memory
    learn = learner_memory(model, replace(work, tokens=fewer, scored=fewer), cut, bool(want.gpus))
    return replace(memory, learn=learn.learn)


def role_cut(role: ModelRole, want: Wanted) -> Cut:
    """Return how a role's state lies over its ranks; there is nothing to offload from a CPU."""
    if not isinstance(role, TrainedRole):
        return Cut(role.ranks, role.zero_stage)
    offload = role.offload if want.gpus else "none"
    return Cut(role.ranks, role.zero_stage, offload, role.gradient_checkpointing)


def role_pass(recipe: Recipe, stage: Stage, ranks: int = 1) -> Pass:
    """Return the largest micro-batch of a rank, with every token's logits: prompts may be short."""
    tokens, width = microbatch_tokens(recipe, stage, ranks), row_tokens(stage)
    rows = step_rows(recipe, stage) / ranks
    return Pass(tokens=tokens, width=width, scored=tokens, passes=max(1, math.ceil(rows * width / tokens)))


def role_model(recipe: Recipe, stage: Stage, role: RoleName, shape: ModelShape) -> Model:
    """Return the copy of the model that a role holds in a stage."""
    match stage:
        case SftStage() | ClassifyStage() | PreferenceStage():
            trained = role == "policy"
        case OnlineStage():
            trained = role in ("policy", "critic")
        case _:
            trained = isinstance(stage, RewardStage) and role == "reward"
    key = "critic_tuning" if isinstance(stage, PpoStage) and role == "critic" else "tuning"
    chosen = getattr(stage, key, None)
    scalar = role in ("reward", "critic") or isinstance(stage, ClassifyStage)  # one row for each label, counted as one
    return Model(shape, recipe.model.precision, scalar, chosen or recipe.tuning if trained else None)


def _judge(stage: Stage) -> LlmJudge:
    return next(judge for judge in judges(stage) if isinstance(judge, LlmJudge) and judge.url is None)


def _engine_phase(engine: EngineMemory, phase: Phase, want: Wanted) -> Memory:
    if phase == "generate" or not (want.gpus and want.shares):
        return engine.awake
    return engine.loaded if phase == "publish" else engine.asleep


def _learner_phase(memory: LearnerMemory, phase: Phase, want: Wanted, turns: bool, sends: bool) -> Memory:
    own = Memory(buffers=CONTEXT if want.gpus else 0)
    sent = min(BUCKET, memory.resident.weights) if sends else 0
    match phase:
        case "score":
            return memory.score.plus(own)
        case "learn":
            return memory.learn.plus(own)
        case "generate":
            return own if turns else memory.resident.plus(own)
        case "publish":
            return memory.resident.plus(own).plus(Memory(buffers=sent))
