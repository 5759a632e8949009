"""JSON over HTTP with retries: the one place that knows timeouts, backoff, tokens and what an error may say."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, NamedTuple, TypeVar

import httpx
from pydantic import ValidationError
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)

from rlhf.errors import RecipeError, TrainingError
from rlhf.proxies import proxy_for
from rlhf.recipe.base import HttpJudge, LlmJudge
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import judges
from rlhf.rewards.breaker import Breaker
from rlhf.untrusted import keep_secret

T = TypeVar("T")
BACKOFF = wait_random_exponential(multiplier=0.5, max=30)
"""Seconds before attempt n + 1: uniform in [0, min(30, 0.5 * 2**(n - 1))] ("full jitter")."""
EXCERPT = 200
LEAST_S = 1.0
"""Seconds: another attempt with less time before the deadline is not begun (less for short deadlines)."""
LARGEST_ANSWER = 16 * 2**20
"""Bytes; a thousand scores are some 20 KB."""


class _Passing(Exception):
    """A failure that another attempt may not have; the server asks for at least `retry_after` seconds before it."""

    def __init__(self, what: str, retry_after: float = 0.0) -> None:
        super().__init__(what)
        self.retry_after = retry_after


@dataclass
class _Tries:
    """The attempts of one request: how many were sent, when they must end, and the last failure to report.

    A deadline that cuts an attempt says nothing about the service, so that attempt does not replace an earlier failure.
    """

    ends: float
    sent: int = 0
    failure: _Passing | None = None

    def failed(self, error: _Passing, cut: bool) -> _Passing:
        """Keep the failure of an attempt, `cut` by the deadline or not, and return the one to report."""
        if self.failure is None or not cut:
            self.failure = error
        return self.failure


class _Refused(ValueError):
    """The service answered with a status that another attempt will not change."""


def token_from(variable: str | None) -> str | None:
    """Return the secret in an environment variable, None for no variable; RecipeError when it is unset or unusable."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if not token:
        raise RecipeError(f"the environment variable {variable}, named in the recipe for a judge's token, is not set")
    if not (token.isascii() and token.isprintable()):
        raise RecipeError(f"the token in the environment variable {variable} holds characters that no header can carry")
    keep_secret(token)
    return token


def check_tokens(recipe: Recipe) -> None:
    """Raise RecipeError, before anything is computed, when the secret that some judge will need is not there."""
    for stage in recipe.stages:
        for judge in judges(stage):
            if isinstance(judge, HttpJudge):
                token_from(judge.token_env)
            elif isinstance(judge, LlmJudge) and judge.url is not None:
                token_from(judge.api_key_env)


class _Answer(NamedTuple):
    """A whole answer, read up to the limit; `complete` says that there was no more."""

    status: int
    headers: httpx.Headers
    content: bytes
    complete: bool


@dataclass(frozen=True)
class Endpoint:
    """A URL that JSON is posted to, with an optional bearer token; times are in seconds."""

    url: str
    token: str | None = field(repr=False)
    timeout_s: float
    deadline_s: float
    breaker: Breaker = field(default_factory=Breaker, repr=False, compare=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep, repr=False, compare=False)

    async def post(
        self, client: httpx.AsyncClient, body: Mapping[str, Any], parse: Callable[[bytes], T], subject: str
    ) -> T:
        """Post `body` and return what `parse` makes of the answer (ValueError there: the answer is wrong).

        Status 429 and 5xx, timeouts and broken connections are tried again with exponential backoff and jitter, not
        before `Retry-After`, while the deadline leaves an attempt useful time; everything else fails at once, and so
        does all after several requests in a row that were given up (`Breaker`). No answer is read beyond
        `LARGEST_ANSWER` bytes or unpacked. TrainingError names URL, the last failure of the service, number of
        attempts and `subject`.
        """
        if refusal := self.breaker.refusal():
            raise self._failure(refusal, 0, subject)
        tries = _Tries(self.clock() + self.deadline_s)
        try:
            answer: _Answer = await self._retrying(tries)(self._attempt, client, body, tries)
            self.breaker.succeeded()
            return parse(self._content(answer))
        except _Passing as error:
            self.breaker.failed(str(error))
            raise self._failure(str(error), tries.sent, subject) from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = self._clean(f"{type(error).__name__}: {error}")
            raise self._failure(what, tries.sent, subject) from None
        except _Refused as error:
            raise self._failure(str(error), tries.sent, subject) from error
        except ValueError as error:
            raise self._failure(self._clean(_wrong(error, answer.status)), tries.sent, subject) from None

    def _retrying(self, tries: _Tries) -> AsyncRetrying:
        def late(state: RetryCallState) -> bool:
            return self._left(tries) - state.upcoming_sleep < self._least()

        stop = stop_after_attempt(1) if self.breaker.probing else late
        again = retry_if_exception_type(_Passing)
        return AsyncRetrying(sleep=self.sleep, retry=again, wait=_pause, stop=stop, reraise=True)

    def _left(self, tries: _Tries) -> float:
        return tries.ends - self.clock()

    def _least(self) -> float:
        """Return the seconds that an attempt after the first needs before the deadline."""
        return min(LEAST_S, self.timeout_s, self.deadline_s / 10)

    async def _attempt(self, client: httpx.AsyncClient, body: Mapping[str, Any], tries: _Tries) -> _Answer:
        left = self._left(tries)
        if tries.failure is not None and left < self._least():  # the pause took longer than was asked for
            raise tries.failure
        tries.sent += 1
        limit = max(0.0, min(self.timeout_s, left))
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            async with (
                asyncio.timeout(limit),
                client.stream("POST", self.url, json=body, headers=headers, timeout=None) as response,
            ):
                answer = await _read(response)
        except TimeoutError as error:
            silent = _Passing(f"no answer within {limit:.3g} s")
            raise tries.failed(silent, cut=limit < self.timeout_s) from error
        except (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError) as error:
            broken = _Passing(self._clean(f"{type(error).__name__}: {error}"))
            raise tries.failed(broken, cut=False) from None  # it quotes what was said
        if answer.status == 429 or answer.status >= 500:
            busy = _Passing(self._status(answer), _retry_after(answer.headers.get("Retry-After", "")))
            raise tries.failed(busy, cut=False)
        return answer

    def _content(self, answer: _Answer) -> bytes:
        """Return the content of a good answer; ValueError says why it is none."""
        if not 200 <= answer.status < 300:
            raise _Refused(self._status(answer))
        if not answer.complete:
            raise ValueError(f"but the answer is longer than {LARGEST_ANSWER // 2**20} MiB")
        if (coding := answer.headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise ValueError(f"but the answer is packed ({coding}), which was not asked for")
        return answer.content

    def _failure(self, what: str, count: int, subject: str) -> TrainingError:
        attempts = "1 attempt" if count == 1 else f"{count} attempts"
        return TrainingError(f"{self.url.partition('?')[0]}: {what} (after {attempts}, {subject})")

    def _status(self, answer: _Answer) -> str:
        said = self._clean(answer.content.decode("utf-8", "replace"))
        return f"status {answer.status}" + (f": {said}" if said else "")

    def _clean(self, text: str) -> str:
        """Return the start of a text in one printable line, without the token, which servers like to repeat."""
        hidden = text.replace(self.token, "***") if self.token else text
        words = "".join(letter if letter.isprintable() else " " for letter in hidden).split()
        return " ".join(words)[:EXCERPT]


async def _read(response: httpx.Response) -> _Answer:
    """Read an answer as it travels, up to the limit."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            break
    return _Answer(response.status_code, response.headers, b"".join(parts), size <= LARGEST_ANSWER)


def client(url: str, connections: int) -> httpx.AsyncClient:
    """Return a client for a URL, of so many connections at once; it follows no redirect.

    ResourceError where the environment's proxy for the URL cannot be used.
    """
    return httpx.AsyncClient(
        limits=httpx.Limits(max_connections=connections),
        verify=_certificates(),
        headers={"Accept-Encoding": "identity"},
        proxy=proxy_for(url),
        trust_env=False,
    )


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # reading them takes longer than most requests


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


def _wrong(error: ValueError, status: int) -> str:
    if not isinstance(error, ValidationError):
        return f"status {status}, {error}"
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"status {status}, but in the answer {place + ': ' if place else ''}{first['msg']}"
