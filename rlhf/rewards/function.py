"""Rewards from a Python function of the user's: `score(prompt, response, metadata) -> float`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

import torch

from rlhf.recipe.base import FunctionJudge
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import judges
from rlhf.rewards.background import in_thread
from rlhf.rewards.function_process import FunctionProcess

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.roles import Pending
    from rlhf.types import Prompt, Rollout


def check_functions(recipe: Recipe) -> None:
    """Raise RecipeError, before anything is computed, when a reward function that some judge will need is unusable."""
    paths = {judge.path for stage in recipe.stages for judge in judges(stage) if isinstance(judge, FunctionJudge)}
    for path in sorted(paths):
        FunctionProcess(path, timeout_s=1.0).end()


class FunctionReward:
    """A `RewardSource` that calls the function once for each response, in a process of its own, which it keeps."""

    def __init__(self, path: str, timeout_s: float = 60.0) -> None:
        """Start the process; RecipeError when `file.py:name` cannot be imported."""
        self.path, self.timeout_s = path, timeout_s
        self.process = FunctionProcess(path, timeout_s)
        self.lock = Lock()

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Tensor]:
        """Return the scores of rollouts, `[B]` float32, to come."""
        texts = [item.prompt for item in rollouts], [item.text for item in rollouts]
        return in_thread(partial(self._tensor, *texts))

    def score_texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Score responses; TrainingError when the function raises, hangs or returns anything but a finite number."""
        with self.lock:
            if not self.process.end.alive:  # a call that failed has ended it
                self.process = FunctionProcess(self.path, self.timeout_s)
            return [self.process.score(prompt, text) for prompt, text in zip(prompts, responses, strict=True)]

    def _tensor(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        return torch.tensor(self.score_texts(prompts, responses), dtype=torch.float32)
