"""Rewards from a Python function of the user's: `score(prompt, response, metadata) -> float`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

import torch

from rlhf.recipe.base import FunctionJudge
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import judges
from rlhf.rewards.background import in_thread
from rlhf.rewards.function_process import LOAD_TIMEOUT_S, FunctionProcess

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.roles import Pending
    from rlhf.types import Prompt, Rollout

NOT_STARTED = -1
"""The place, before all responses, of a failure to start a process."""


def check_functions(recipe: Recipe) -> None:
    """Raise RecipeError, before anything is computed, when a reward function that some judge will need is unusable."""
    found = [judge for stage in recipe.stages for judge in judges(stage) if isinstance(judge, FunctionJudge)]
    patience: dict[str, float] = {}
    for judge in found:
        patience[judge.path] = max(judge.load_timeout_s, patience.get(judge.path, 0.0))
    for path in sorted(patience):
        FunctionProcess(path, timeout_s=1.0, load_timeout_s=patience[path]).end()


class FunctionReward:
    """A `RewardSource` that calls the function once for each response, in `workers` processes, which it keeps.

    A process takes the next response when it is done with one; which one scores a response changes nothing, unless the
    function remembers earlier calls. The first process is started here, the others when there is work for them.
    """

    def __init__(
        self, path: str, timeout_s: float = 60.0, workers: int = 1, load_timeout_s: float = LOAD_TIMEOUT_S
    ) -> None:
        """Start the first process; RecipeError when `file.py:name` cannot be imported."""
        self.start = partial(FunctionProcess, path, timeout_s, load_timeout_s)
        self.processes: list[FunctionProcess | None] = [self.start(), *[None] * (workers - 1)]
        self.lock = Lock()

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Tensor]:
        """Return the scores of rollouts, `[B]` float32, to come."""
        texts = [item.prompt for item in rollouts], [item.text for item in rollouts]
        return in_thread(partial(self._tensor, *texts))

    def score_texts(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        """Return the scores of responses, in their order.

        TrainingError when the function raises, hangs or returns anything but a finite number. Of several such
        responses the first is named, as if one process had scored all: what stands before it is scored too.
        """
        todo = deque(enumerate(zip(prompts, responses, strict=True)))
        scores = [0.0] * len(todo)
        failures: dict[int, BaseException] = {}
        with self.lock:
            work = partial(self._work, todo=todo, scores=scores, failures=failures)
            others = [in_thread(partial(work, number)) for number in range(1, min(len(self.processes), len(todo)))]
            work(0)
            for other in others:
                other.result()
        if failures:
            raise failures[min(failures)]
        return scores

    def _work(
        self,
        number: int,
        todo: deque[tuple[int, tuple[Prompt, str]]],
        scores: list[float],
        failures: dict[int, BaseException],
    ) -> None:
        """Score responses with one process until none is left or one has failed."""
        place = NOT_STARTED
        try:
            process = self.processes[number]
            if process is None or not process.end.alive:  # a call that failed has ended it
                process = self.processes[number] = self.start()
            while todo and not failures:
                try:
                    place, (prompt, text) = todo.popleft()
                except IndexError:  # another process has just taken the last one
                    return
                scores[place] = process.score(prompt, text)
        except BaseException as error:
            failures[place] = error

    def _tensor(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Tensor:
        return torch.tensor(self.score_texts(prompts, responses), dtype=torch.float32)
