"""A judge behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
from pydantic import BaseModel, Field

from rlhf.recipe.base import LlmJudge
from rlhf.rewards.background import in_background
from rlhf.rewards.http import Endpoint, client, token_from
from rlhf.rewards.question import FREE, REMINDER, Question, parse
from rlhf.rewards.verdicts import Verdict

TEMPERATURE = 0
MAX_TOKENS = 8


class _Message(BaseModel):
    content: str | None


class _Choice(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


class ChatJudge:
    """Asks `<url>/chat/completions`, `concurrency` questions at once, at temperature 0."""

    def __init__(self, settings: LlmJudge, url: str) -> None:
        """RecipeError when the environment variable of the key is not set."""
        self.settings = settings
        self.endpoint = Endpoint(
            url.rstrip("/") + "/chat/completions",
            token_from(settings.api_key_env),
            settings.timeout_s,
            settings.deadline_s,
        )

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Where it is asked, and how the answer is drawn and read."""
        return {
            "url": plain_url(self.endpoint.url),
            "sampling": [TEMPERATURE, MAX_TOKENS],
            "words": [FREE, REMINDER],
        }

    def text(self, question: Question) -> str:
        """Return a question in words."""
        return question.text(self.settings.criteria, FREE)

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        """Return a verdict on each question, 1, 0.5 or 0; an answer that cannot be read is asked for once more."""
        return in_background(self._all(questions)).result()

    async def _all(self, questions: Sequence[Question]) -> list[Verdict]:
        places = asyncio.Semaphore(self.settings.concurrency)
        async with client(self.settings.concurrency) as http:

            async def verdict(question: Question) -> Verdict:
                async with places:
                    first = await self._ask(http, question, self.text(question))
                    return await self._ask(http, question, self.text(question) + REMINDER) if first is None else first

            return await asyncio.gather(*(verdict(question) for question in questions))

    async def _ask(self, http: httpx.AsyncClient, question: Question, text: str) -> Verdict:
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": TEMPERATURE,
            "max_tokens": MAX_TOKENS,
        }
        return parse(await self.endpoint.post(http, body, _content, f"prompt id {question.prompt_id}"))


def _content(answer: bytes) -> str:
    """Return what the model said; models that only thought have said nothing."""
    return _Completion.model_validate_json(answer).choices[0].message.content or ""


def plain_url(url: str) -> str:
    """Return a URL as all its spellings have it in common: no user name, password or fragment, nothing superfluous."""
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    standard = {"http": 80, "https": 443}.get(parts.scheme)
    place = host if parts.port in (None, standard) else f"{host}:{parts.port}"
    return urlunsplit((parts.scheme, place, parts.path.rstrip("/"), parts.query, ""))
