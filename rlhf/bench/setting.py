"""What is measured: a model, and the roles and stages of a recipe that hold it; a model of our own without a recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from pydantic import TypeAdapter

from rlhf.models.cache import default_cache, file_digest, held_model
from rlhf.models.loading import resolve_model
from rlhf.recipe.base import FunctionJudge, ModelJudge, PathData
from rlhf.recipe.dtype import Here, decide
from rlhf.recipe.resources import threads
from rlhf.recipe.role_schema import Roles as RoleSections
from rlhf.recipe.role_schema import RolloutRole, TrainedRole
from rlhf.recipe.schema import ModelSource, Recipe
from rlhf.recipe.stage_schema import Stage
from rlhf.recipe.tuning_schema import Full

LearnerKind = Literal["sft", "dpo", "reward", "ppo"]
LEARNERS: tuple[LearnerKind, ...] = get_args(LearnerKind)
BATCH = 32
"""Sequences that are generated at once."""

CALL_S = 300.0
DATA = PathData(path=Path("none.jsonl"))
OWN_STAGES: dict[str, dict[str, object]] = {
    "sft": {"data": DATA},
    "dpo": {"policy": "sft", "data": DATA},
    "reward": {"data": DATA},
    "ppo": {"policy": "sft", "reward": ModelJudge(kind="model", stage="reward"), "prompts": DATA, "steps": 1},
    "annotate": {"policy": "sft", "prompts": DATA, "judge": FunctionJudge(kind="function", path="none.py:score")},
}
"""What a stage must say that the recipe has none of; no file is ever read."""


@dataclass(frozen=True)
class Setting:
    """A model's folder, and a recipe with one stage for each thing that is measured; `seconds` scales all budgets."""

    recipe: Recipe
    folder: Path
    cores: int
    seconds: float = 1.0

    @staticmethod
    def of(recipe: Recipe | None, gpus: int = 0, seconds: float = 1.0) -> Setting:
        """Return what to measure for a recipe: its model, dtype, roles, adapters and micro-batches.

        Without one, a random 45M-parameter Llama that trains all its weights, on a GPU where there is one.
        Raises RecipeError when the recipe's model cannot be had.
        """
        own = recipe is None
        base = decide(own_recipe(gpus) if recipe is None else recipe, Here(gpus)).recipe
        stages = [_stage(base, kind) for kind in OWN_STAGES]
        folder = own_model() if own else resolve_model(base.model)
        made = base.model_copy(update={"stages": stages})
        return Setting(made, folder, len(os.sched_getaffinity(0)), seconds)

    @property
    def on_gpus(self) -> bool:
        """Whether the policy runs on GPUs."""
        return self.recipe.roles.policy.gpus > 0

    @property
    def engine_on_gpus(self) -> bool:
        """Whether the rollout engine does."""
        rollout = self.recipe.roles.rollout
        return (self.recipe.roles.policy if rollout.share else rollout).gpus > 0

    def stage(self, kind: LearnerKind | Literal["annotate"]) -> Stage:
        """Return the stage of a kind."""
        return next(stage for stage in self.recipe.stages if stage.kind == kind)

    def threads(self, kind: LearnerKind | Literal["annotate"]) -> int:
        """Return the threads of the role that works in a stage, as a run would give it."""
        role = {"reward": "reward", "annotate": "rollout"}.get(kind, "policy")
        return threads(self.recipe, self.stage(kind), self.cores)[role]  # type: ignore[index]

    def thread_counts(self) -> list[int]:
        """Return the threads that roles get, and all cores, fewest first."""
        return sorted({self.cores, self.threads("annotate"), *map(self.threads, LEARNERS)})

    def served(self) -> Recipe:
        """Return a recipe whose run has a policy of one rank and one engine, for one batch, and no second try."""
        roles = self.recipe.roles
        policy = roles.policy.model_copy(update={"ranks": 1, "offload": "none"})
        most = max(BATCH, roles.rollout.max_sequences)
        rollout = roles.rollout.model_copy(update={"replicas": 1, "max_sequences": most})
        return self.recipe.model_copy(
            update={
                "stages": [self.stage("sft"), self.stage("annotate")],
                "roles": roles.model_copy(update={"policy": policy, "rollout": rollout}),
                "recovery": self.recipe.recovery.model_copy(update={"restarts": 0}),
                "ray": self.recipe.ray.model_copy(update={"call_timeout_s": CALL_S}),
            }
        )


def own_recipe(gpus: int) -> Recipe:
    """Return the recipe of a measurement without one: on the CPU, or with engine and policy on one GPU or two."""
    rollout = {0: RolloutRole(), 1: RolloutRole(share="policy")}.get(gpus, RolloutRole(gpus=1))
    roles = RoleSections(policy=TrainedRole(gpus=min(1, gpus)), rollout=rollout)
    return Recipe(name="bench", model=ModelSource(path="bench"), tuning=Full(), roles=roles, stages=[_own_stage("sft")])


def own_model() -> Path:
    """Return the folder of a random Llama of 45M weights (hidden 512, 4 layers, vocabulary 32k), built once."""
    import torch

    from rlhf.models import tiny

    build = partial(
        tiny.build_tiny,
        hidden=512,
        intermediate=1376,
        layers=4,
        heads=8,
        kv_heads=4,
        tied=False,
        vocabulary=32_000,
        positions=2048,
        dtype=torch.bfloat16,
    )
    return held_model(default_cache(), "bench-llama", f"{build.keywords} {file_digest(Path(tiny.__file__))}", build)


def _stage(recipe: Recipe, kind: str) -> Stage:
    """Return the recipe's first stage of a kind, or one with the defaults of its kind; annotating is always ours."""
    theirs = (stage for stage in recipe.stages if stage.kind == kind and kind != "annotate")
    return next(theirs, None) or _own_stage(kind)


def _own_stage(kind: str) -> Stage:
    made: Stage = TypeAdapter(Stage).validate_python({"name": kind, "kind": kind, **OWN_STAGES[kind]})
    return made
