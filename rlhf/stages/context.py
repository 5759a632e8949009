"""What every stage is given, and how it builds its roles from the recipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf.engines.base import Kind, LearnerSpec, RolloutSpec
from rlhf.fingerprint import folder_digest
from rlhf.models.cache import default_cache
from rlhf.models.loading import resolve_judge
from rlhf.models.tokenizer import ChatTokenizer, load_tokenizer
from rlhf.recipe.base import FunctionJudge, HttpJudge, Judge, LlmJudge, ModelJudge, Optimizer
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.role_schema import RoleName
from rlhf.recipe.schedule import pass_tokens
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_base import MARK
from rlhf.recipe.stage_schema import CompareStage, Stage
from rlhf.recipe.tuning_schema import Lora, Tuning
from rlhf.recipe.tuning_support import support
from rlhf.report.results import Cost
from rlhf.rewards.chat import ChatJudge
from rlhf.rewards.engine import EngineJudge
from rlhf.rewards.function import FunctionReward
from rlhf.rewards.llm import LlmReward
from rlhf.rewards.model import ModelReward
from rlhf.rewards.remote import HttpReward
from rlhf.rewards.verdicts import VerdictCache
from rlhf.roles import Launcher, Learner, RewardSource
from rlhf.seeding import derive
from rlhf.stages.recovery import StageRecovery
from rlhf.tracking import Tracker

MODEL = "model"
ADAPTER = "adapter"
"""Folders of a finished stage: its model as plain weights, and what it learned beside the model it started from."""


@dataclass(frozen=True)
class StageContext:
    """One stage's surroundings.

    `outputs` maps `base`, the recipe's `checkpoints` and each finished stage to its folder; `devices` counts the
    accelerators (CPU cores where there are none) that the stage holds. `usual_length` is the length of the longest
    sequence that the run's prompts can grow to.
    """

    recipe: Recipe
    stage: Stage
    folder: Path
    outputs: Mapping[str, Path]
    launcher: Launcher
    tracker: Tracker
    threads: Mapping[RoleName, int]
    max_length: int
    devices: float
    recovery: StageRecovery
    usual_length: int | None = None

    def seed(self, *parts: str | int) -> int:
        """Return a seed for one purpose inside this stage."""
        seed = self.recipe.seed if self.stage.seed is None else self.stage.seed
        return derive(seed, self.stage.name.partition(MARK)[0], *parts)

    def cost(self) -> Cost:
        """Return what the stage has spent so far."""
        tracker, seconds = self.tracker, time.monotonic() - self.tracker.started
        return Cost(tracker.gradient_tokens, tracker.generated_tokens, seconds, seconds * self.devices)

    def spent(self) -> float:
        """Return the share of the recipe's budget that this stage has used, by the nearest limit; 0 without one."""
        budget = self.recipe.budget
        if budget is None or not isinstance(self.stage, OnlineStage | PreferenceStage):
            return 0.0
        return self.cost().share(budget)

    def total_steps(self, step: int, planned: int) -> int:
        """Return how many steps the stage will make: those planned, or fewer where the budget ends before."""
        used = self.spent()
        return planned if used == 0 else min(planned, max(step + 1, round(step / used)))

    def checkpoint(self, name: str) -> Path:
        """Return the folder of `base`, of one of `checkpoints`, of a finished stage's model, or of `stage/step-3`."""
        stage, _, saved = name.partition("/")
        if stage == "base" or stage in self.recipe.checkpoints:
            return self.outputs[stage]
        return self.outputs[stage] / ("checkpoints" if saved else MODEL) / saved

    def saved(self, name: str) -> list[str]:
        """Return the checkpoints that a stage saved on its way, first to last, as `checkpoint` takes them."""
        folders = (self.outputs[name] / "checkpoints").glob("step-*")
        steps = sorted(int(folder.name.removeprefix("step-")) for folder in folders)
        return [f"{name}/step-{step}" for step in steps]

    def tokenizer(self, name: str) -> ChatTokenizer:
        """Load the tokenizer of a checkpoint."""
        return load_tokenizer(self.checkpoint(name))

    def trained(
        self,
        role: RoleName,
        kind: Kind,
        checkpoint: str,
        optimizer: Optimizer,
        tuning: Tuning | None,
        head_learning_rate: float | None = None,
        temperature: float = 1.0,
    ) -> LearnerSpec:
        """Describe a model that this stage trains; `tuning` None takes the recipe's."""
        placed = getattr(self.recipe.roles, role)
        return replace(
            self.frozen(role, kind, checkpoint, temperature),
            tuning=tuning or self.recipe.tuning,
            optimizer=optimizer,
            head_learning_rate=head_learning_rate,
            offload=placed.offload,
            gradient_checkpointing=placed.gradient_checkpointing,
        )

    def save(self, model: Learner) -> None:
        """Leave what the stage trained: `model`, a plain one, and `adapter`, as far as its tuning method gives them."""
        able = support(getattr(self.stage, "tuning", None) or self.recipe.tuning)
        if able.merges:
            model.save(self.folder / MODEL).result()
        if able.adapter:
            model.save_adapter(self.folder / ADAPTER).result()

    def frozen(self, role: RoleName, kind: Kind, checkpoint: str, temperature: float = 1.0) -> LearnerSpec:
        """Describe a model that this stage only asks."""
        placed = getattr(self.recipe.roles, role)
        return LearnerSpec(
            role=role,
            kind=kind,
            checkpoint=self.checkpoint(checkpoint),
            dtype=self.recipe.model.precision,
            tuning=None,
            optimizer=None,
            head_learning_rate=None,
            max_tokens_per_microbatch=pass_tokens(self.recipe, self.stage),
            temperature=temperature,
            threads=self.threads[role],
            seed=self.seed("model", role),
            ranks=placed.ranks,
            zero_stage=placed.zero_stage,
            offload="parameters" if getattr(placed, "offload", "none") == "parameters" else "none",
        )

    def rollout(self, checkpoint: str) -> RolloutSpec:
        """Describe the rollout engine, serving a checkpoint."""
        return RolloutSpec(
            checkpoint=self.checkpoint(checkpoint),
            dtype=self.recipe.model.precision,
            role=self.recipe.roles.rollout,
            max_length=self.max_length,
            threads=self.threads["rollout"],
            seed=self.recipe.seed,
            lora=largest_adapter(self.recipe) if self.recipe.roles.rollout.weights == "adapter" else None,
            usual_length=self.usual_length,
        )

    def judge(self, judge: Judge, pad_id: int) -> RewardSource:
        """Start the reward source that a judge section describes."""
        match judge:
            case FunctionJudge():
                return FunctionReward(judge.path, judge.timeout_s, judge.workers, judge.load_timeout_s)
            case HttpJudge():
                complete = isinstance(self.stage, CompareStage)  # nothing is left out of a comparison
                return HttpReward(judge.model_copy(update={"on_error": "fail"}) if complete else judge)
            case ModelJudge():
                return ModelReward(self.launcher.reward(self.frozen("reward", "scalar", judge.stage)), pad_id)
            case LlmJudge():
                return self._language_model(judge)

    def _language_model(self, judge: LlmJudge) -> LlmReward:
        """Build a judge behind an endpoint, or one that runs here with its own model and tokenizer."""
        cache = VerdictCache(default_cache() / "verdicts.sqlite")
        if judge.url is not None:
            return LlmReward(ChatJudge(judge, judge.url), judge.model, cache)
        folder = resolve_judge(judge.model)
        spec = RolloutSpec(
            checkpoint=folder,
            dtype=self.recipe.model.precision,
            role=self.recipe.roles.judge,
            max_length=judge.max_prompt_tokens + 1,
            threads=self.threads["judge"],
            seed=self.recipe.seed,
        )
        engine = self.launcher.judge(spec)
        source = EngineJudge(engine, load_tokenizer(folder), judge.criteria, judge.max_prompt_tokens)
        return LlmReward(source, f"{folder_digest(folder)} {spec.dtype} {spec.role.engine}", cache)


def largest_adapter(recipe: Recipe) -> Lora | None:
    """Return the adapter of the highest rank that a stage of the recipe trains; None where none trains any."""
    own = [getattr(stage, "tuning", None) for stage in recipe.stages]
    adapters = [adapter for adapter in (recipe.tuning, *own) if isinstance(adapter, Lora)]
    return max(adapters, key=lambda adapter: adapter.r, default=None)
