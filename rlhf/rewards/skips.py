"""The gate between scores and what learns from them: nothing that is not a finite number passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from rlhf.errors import GuardError, TrainingError
from rlhf.rewards.remote import HttpReward
from rlhf.roles import RewardSource
from rlhf.types import Metrics, Rollout


class Skips:
    """Leaves out the prompts to which a service with `on_error: skip_group` gave no scores, and counts them.

    One counts for one step of training, or for a whole annotate stage.
    """

    def __init__(self, source: RewardSource) -> None:
        self.service = source if isinstance(source, HttpReward) and source.skips else None
        self.prompts = self.skipped = 0

    def kept(self, scores: Tensor, rollouts: Sequence[Rollout]) -> list[int]:
        """Return the rows, in order, of the prompts whose every sample has a score; scores are `[B]`.

        GuardError names the prompt of a score that is not finite. TrainingError repeats the service's failure when
        more than its `max_skipped` of all prompts so far, or all of them, have none.
        """
        values = scores.tolist()
        lost = set()
        for value, rollout in zip(values, rollouts, strict=True):
            if math.isnan(value) and self.service:
                lost.add(rollout.prompt.id)
            elif not math.isfinite(value):
                raise GuardError(
                    f"the reward's score of a response to prompt id {rollout.prompt.id} is {value}; nothing was learnt"
                    " from it: look at the reward model or the judge"
                )
        self.prompts += len({rollout.prompt.id for rollout in rollouts})
        self.skipped += len(lost)
        self._check()
        return [row for row, rollout in enumerate(rollouts) if rollout.prompt.id not in lost]

    def carry(self) -> dict[str, int]:
        """Return the counts, for `take_up`."""
        return {"prompts": self.prompts, "skipped": self.skipped}

    def take_up(self, carried: Mapping[str, int]) -> None:
        """Go on counting from there; from nothing where nothing was carried."""
        self.prompts, self.skipped = carried.get("prompts", 0), carried.get("skipped", 0)

    def metrics(self) -> Metrics:
        """Return how many prompts were left out, where they may be."""
        return Metrics.of(1, skipped_groups=self.skipped) if self.service else Metrics()

    def _check(self) -> None:
        if self.service and self.skipped and (self._share() > self.service.max_skipped or self._share() == 1):
            raise TrainingError(
                f"{self.skipped} of {self.prompts} prompts have no scores (max_skipped {self.service.max_skipped:g}):"
                f" {self.service.failure}"
            )

    def _share(self) -> float:
        return self.skipped / self.prompts
