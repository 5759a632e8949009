"""JSON over HTTP with retries: the one place that knows timeouts, backoff, tokens and what an error may say."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from threading import Thread
from typing import Any, TypeVar

import httpx
from pydantic import ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_before_delay,
    wait_random_exponential,
)

from rlhf.errors import RecipeError, TrainingError
from rlhf.recipe.base import HttpJudge, LlmJudge
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import judges

T = TypeVar("T")
BACKOFF = wait_random_exponential(multiplier=0.5, max=30)
"""Seconds before attempt n + 1: uniform in [0, min(30, 0.5 * 2**(n - 1))] ("full jitter")."""
EXCERPT = 200


class _Passing(Exception):
    """A failure that another attempt may not have; the server asks for at least `retry_after` seconds before it."""

    def __init__(self, what: str, retry_after: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after = retry_after


def token_from(variable: str | None) -> str | None:
    """Return the secret in an environment variable, None for no variable; RecipeError when it is unset or unusable."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise RecipeError(f"the environment variable {variable}, named in the recipe for a judge's token, is not set")
    if not (token.isascii() and token.isprintable()):
        raise RecipeError(f"the token in the environment variable {variable} holds characters that no header can carry")
    return token


def check_tokens(recipe: Recipe) -> None:
    """Raise RecipeError, before anything is computed, when the secret that some judge will need is not there."""
    for stage in recipe.stages:
        for judge in judges(stage):
            if isinstance(judge, HttpJudge):
                token_from(judge.token_env)
            elif isinstance(judge, LlmJudge) and judge.url is not None:
                token_from(judge.api_key_env)


@dataclass(frozen=True)
class Endpoint:
    """A URL that JSON is posted to, with an optional bearer token; times are in seconds."""

    url: str
    token: str | None = field(repr=False)
    timeout_s: float
    deadline_s: float

    async def post(
        self, client: httpx.AsyncClient, body: Mapping[str, Any], parse: Callable[[bytes], T], subject: str
    ) -> T:
        """Post `body` and return what `parse` makes of the answer (ValueError there: the answer is wrong).

        Status 429 and 5xx, timeouts and broken connections are tried again with exponential backoff and jitter, not
        before `Retry-After`, until the deadline; everything else fails at once. TrainingError names URL, status,
        number of attempts and `subject`.
        """
        ends = time.monotonic() + self.deadline_s
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_Passing), wait=_pause, stop=stop_before_delay(self.deadline_s), reraise=True
        )
        try:
            response: httpx.Response = await retrying(self._attempt, client, body, ends)
        except _Passing as error:
            raise self._failure(str(error), retrying, subject) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._failure(self._clean(f"{type(error).__name__}: {error}"), retrying, subject) from None
        if not response.is_success:
            raise self._failure(self._status(response), retrying, subject)
        try:
            return parse(response.content)
        except ValueError as error:
            raise self._failure(f"status {response.status_code}, {_wrong(error)}", retrying, subject) from error

    async def _attempt(self, client: httpx.AsyncClient, body: Mapping[str, Any], ends: float) -> httpx.Response:
        limit = max(0.0, min(self.timeout_s, ends - time.monotonic()))
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            async with asyncio.timeout(limit):
                response = await client.post(self.url, json=body, headers=headers, timeout=None)
        except TimeoutError as error:
            raise _Passing(f"no answer within {limit:.3g} s") from error
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
            raise _Passing(self._clean(f"{type(error).__name__}: {error}")) from error
        if response.status_code == 429 or response.status_code >= 500:
            raise _Passing(self._status(response), _retry_after(response.headers.get("Retry-After", "")))
        return response

    def _failure(self, what: str, retrying: AsyncRetrying, subject: str) -> TrainingError:
        count = retrying.statistics["attempt_number"]
        attempts = "1 attempt" if count == 1 else f"{count} attempts"
        return TrainingError(f"{self.url.partition('?')[0]}: {what} (after {attempts}, {subject})")

    def _status(self, response: httpx.Response) -> str:
        said = self._clean(response.text)
        return f"status {response.status_code}" + (f": {said}" if said else "")

    def _clean(self, text: str) -> str:
        """Return the start of a text in one line, without the token, which servers like to repeat."""
        hidden = text.replace(self.token, "***") if self.token else text
        return " ".join(hidden.split())[:EXCERPT]


def in_background(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in a thread of its own, which never keeps the process alive, and return its result to come."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(asyncio.run(work))
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def _pause(state: RetryCallState) -> float:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, _Passing)
    return max(BACKOFF(state), error.retry_after)


def _retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date (RFC 9110, 10.2.3); else 0."""
    if re.fullmatch(r"\d+(\.\d+)?", value, re.ASCII):
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    aware = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def _wrong(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"but in the answer {place + ': ' if place else ''}{first['msg']}"
