"""Rewards from a service: batches of responses are posted, scores come back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import torch
from pydantic import BaseModel, Field

from rlhf.errors import DataError
from rlhf.recipe.base import HttpJudge
from rlhf.rewards.http import Endpoint, in_background, token_from

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.roles import Pending
    from rlhf.types import Rollout

LARGEST = torch.finfo(torch.float32).max


class Scores(BaseModel):
    """The service's answer: numbers that float32 holds."""

    scores: list[Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]]


class HttpReward:
    """A `RewardSource` behind a URL, asked in the background.

    `{"items": [{"prompt", "response", "metadata"}]}` is answered by `{"scores": [...]}`, one for each item in order.
    """

    def __init__(self, settings: HttpJudge) -> None:
        """RecipeError when the environment variable of the token is not set."""
        self.batch_size = settings.batch_size
        self.endpoint = Endpoint(settings.url, token_from(settings.token_env), settings.timeout_s, settings.deadline_s)

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Tensor]:
        """Return the scores of rollouts, `[B]` float32, to come.

        The result is a TrainingError when the service does not give them all, and a DataError when the metadata of a
        prompt is nothing that JSON can hold.
        """
        return in_background(self._scores(rollouts))

    async def _scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        scores: list[float] = []
        async with httpx.AsyncClient() as client:
            for start in range(0, len(rollouts), self.batch_size):
                part = rollouts[start : start + self.batch_size]
                body = {"items": [_item(rollout) for rollout in part]}
                subject = f"first prompt id {part[0].prompt.id}"
                scores += await self.endpoint.post(client, body, partial(_parse, count=len(part)), subject)
        return torch.tensor(scores, dtype=torch.float32)


def _item(rollout: Rollout) -> dict[str, Any]:
    prompt = rollout.prompt
    metadata = dict(prompt.metadata)
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"prompt id {prompt.id}: its metadata cannot be sent to a reward service: {error}") from error
    return {"prompt": prompt.text, "response": rollout.text, "metadata": metadata}


def _parse(content: bytes, count: int) -> list[float]:
    scores = Scores.model_validate_json(content, strict=True).scores
    if len(scores) != count:
        raise ValueError(f"but {len(scores)} scores for {count} items")
    return scores
