"""Rewards from a service: batches of responses are posted, scores come back."""

from __future__ import annotations

import asyncio
import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import torch
from pydantic import BaseModel, Field

from rlhf.errors import DataError, TrainingError
from rlhf.recipe.base import HttpJudge
from rlhf.rewards.background import in_background
from rlhf.rewards.http import Endpoint, client, token_from

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf.roles import Pending
    from rlhf.types import Rollout

log = logging.getLogger("rlhf")
BATCHES_AT_ONCE = 4
LARGEST = torch.finfo(torch.float32).max


class Scores(BaseModel):
    """The service's answer: numbers that float32 holds."""

    scores: list[Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]]


class HttpReward:
    """A `RewardSource` behind a URL, asked in the background, a few batches at once.

    `{"items": [{"prompt", "response", "metadata"}]}` is answered by `{"scores": [...]}`, one for each item in order.
    """

    def __init__(self, settings: HttpJudge) -> None:
        """RecipeError when the environment variable of the token is not set."""
        self.batch_size = settings.batch_size
        self.endpoint = Endpoint(settings.url, token_from(settings.token_env), settings.timeout_s, settings.deadline_s)
        self.skips, self.max_skipped = settings.on_error == "skip_group", settings.max_skipped
        self.failure = ""  # why the last batch without scores has none

    def score(self, rollouts: Sequence[Rollout]) -> Pending[Tensor]:
        """Return the scores of rollouts, `[B]` float32, to come.

        Where the service does not give them all, the result is a TrainingError or, with `on_error: skip_group`, NaN for
        every rollout of the batch without scores: `Skips` leaves those prompts out. It is a DataError when the metadata
        of a prompt is nothing that JSON can hold.
        """
        return in_background(self._scores(rollouts))

    async def _scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        places = asyncio.Semaphore(BATCHES_AT_ONCE)
        starts = range(0, len(rollouts), self.batch_size)
        parts = [rollouts[start : start + self.batch_size] for start in starts]
        bodies = [{"items": [_item(rollout) for rollout in part]} for part in parts]
        async with client(self.endpoint.url, BATCHES_AT_ONCE) as http:

            async def batch(part: Sequence[Rollout], body: dict[str, Any]) -> list[float]:
                async with places:
                    return await self._batch(http, part, body)

            found = await asyncio.gather(*map(batch, parts, bodies))
        return torch.tensor([score for scores in found for score in scores], dtype=torch.float32)

    async def _batch(self, http: httpx.AsyncClient, part: Sequence[Rollout], body: dict[str, Any]) -> list[float]:
        subject = f"first prompt id {part[0].prompt.id}"
        try:
            return await self.endpoint.post(http, body, partial(_parse, count=len(part)), subject)
        except TrainingError as error:
            if not self.skips:
                raise
            self.failure = str(error)
            log.warning("%s; the prompts of this batch are left out", error)
            return [math.nan] * len(part)


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
