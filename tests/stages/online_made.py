"""Stages, contexts and roles made by hand for the tests of the online methods."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rlhf.interrupts import Interrupts
from rlhf.local import LocalLauncher
from rlhf.progress import Display
from rlhf.recipe.base import Budget, FunctionJudge, PathData
from rlhf.recipe.online_schema import (
    DrGrpoStage,
    GrpoStage,
    OnlineDpoStage,
    OnlineStage,
    PpoStage,
    ReinforceStage,
    RlooStage,
)
from rlhf.recipe.schema import ModelSource, Recipe
from rlhf.roles import Ready, Roles
from rlhf.stages.context import StageContext
from rlhf.stages.experience import Scored
from rlhf.stages.recovery import StageRecovery
from rlhf.tracking import Tracker
from rlhf.types import Metrics, Prompt, Rollout, TokenBatch, TokenScores, ValueBatch

STAGES = {
    "ppo": PpoStage,
    "grpo": GrpoStage,
    "dr_grpo": DrGrpoStage,
    "rloo": RlooStage,
    "reinforce_pp": ReinforceStage,
    "online_dpo": OnlineDpoStage,
}


def stage_of(kind: str, **settings: Any) -> Any:
    shared = {
        "name": kind,
        "kind": kind,
        "policy": "base",
        "reward": FunctionJudge(kind="function", path="rewards.py:score"),
        "prompts": PathData(path=Path("prompts.jsonl")),
        "steps": 10,
        "prompts_per_step": 2,
        "samples_per_prompt": 3,
        "minibatch_size": 4,
        "max_response_tokens": 4,
    }
    return STAGES[kind](**{**shared, **settings})


def context_of(stage: OnlineStage, folder: Path, budget: Budget | None = None) -> StageContext:
    recipe = Recipe(name="made", model=ModelSource(path="tiny://llama", dtype="float32"), stages=[stage], budget=budget)
    tracker = Tracker(stage.name, folder, Display(Console(quiet=True)), None)
    recovery = StageRecovery(folder / "state", "", {}, recipe.recovery, tracker, Interrupts())
    return StageContext(recipe, stage, folder, {}, LocalLauncher(recipe), tracker, {}, 64, 1, recovery)


def scored_of(scores: list[float], per_prompt: int = 3, kl: float = 0.0) -> Scored:
    """Rows of 2 prompt tokens and 1, 2, 3, 1, 2, 3... response tokens; each response token has this KL."""
    rows = len(scores)
    lengths = 1 + torch.arange(rows) % 3
    columns = torch.arange(5)
    real = columns < 2 + lengths[:, None]
    mask = real & (columns >= 2)
    tokens = (10 + torch.arange(rows)[:, None] * 5 + columns).masked_fill(~real, 0)
    old = torch.full(mask.shape, -1.0).masked_fill(~mask, 0)
    raw = torch.tensor(scores, dtype=torch.float32)
    return Scored(
        batch=TokenBatch(tokens, real, mask, old),
        groups=torch.arange(rows) // per_prompt,
        raw_scores=raw,
        scores=raw,
        old=TokenScores(old, torch.ones(mask.shape).masked_fill(~mask, 0)),
        ref_logprobs=(old - kl).masked_fill(~mask, 0),
        values=torch.zeros(mask.shape),
        unfinished=torch.zeros(rows, dtype=torch.bool),
    )


@dataclass
class Pupil:
    """A model that writes down what it is taught; as a critic it says `fit` everywhere once it is fitted."""

    fit: float = 0.0
    fitted: list[ValueBatch] = field(default_factory=list)
    lessons: list[tuple[Any, Any, list[list[int]], float]] = field(default_factory=list)

    def train(self, batch: Any, objective: Any, minibatches: Any, lr_scale: float) -> Ready[Metrics]:
        self.lessons.append((batch, objective, [list(rows) for rows in minibatches], lr_scale))
        return Ready(Metrics.of(1, grad_norm=2.0 * len(self.lessons), skipped_steps=0.0))

    def values(self, batch: TokenBatch) -> Ready[torch.Tensor]:
        return Ready(torch.zeros(batch.tokens.shape))

    def fit_values(self, batch: ValueBatch) -> Ready[torch.Tensor]:
        self.fitted.append(batch)
        return Ready(self.fit * batch.batch.response_mask)


class Echo:
    """An engine whose response to the k-th sample of a prompt is k + 1 tokens, and which remembers the prompts."""

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.asked: list[list[str]] = []

    def generate(self, prompts: Any, sampling: Any, seeds: Any) -> Ready[list[Rollout]]:
        self.asked.append([prompt.id for prompt in prompts])
        return Ready(
            [
                Rollout(prompt, (7,) * (k + 1), (-1.0,) * (k + 1), f"{k}", "stop", self.version, seed)
                for prompt, of_prompt in zip(prompts, seeds, strict=True)
                for k, seed in enumerate(of_prompt)
            ]
        )


class FlatOn:
    """A reward that gives every sample of some prompts the same score, and counts its calls."""

    def __init__(self, *flat: str) -> None:
        self.flat = set(flat)
        self.calls: list[int] = []

    def score(self, rollouts: Any) -> Ready[torch.Tensor]:
        self.calls.append(len(rollouts))
        return Ready(torch.tensor([1.0 if r.prompt.id in self.flat else float(len(r.tokens)) for r in rollouts]))


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(f"p{row}", (1, 2), "question") for row in range(count)]


def roles_of(reward: Any, engine: Any) -> Roles:
    nothing: Any = None
    return Roles(nothing, nothing, reward, engine)
