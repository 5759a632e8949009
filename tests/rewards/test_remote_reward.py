"""A reward service over HTTP, and every way in which it can fail; the server is real."""

from __future__ import annotations

import asyncio
import gzip
import math
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
import torch
from local_server import Answer, LocalServer

from rlhf.errors import DataError, RecipeError, TrainingError
from rlhf.recipe.base import HttpJudge
from rlhf.recipe.load import load_recipe
from rlhf.rewards.breaker import OPENS_AFTER, Breaker
from rlhf.rewards.http import Endpoint
from rlhf.rewards.remote import BATCHES_AT_ONCE, HttpReward
from rlhf.types import Prompt, Rollout

SECRET = "s3cret-token"


class Clock:
    """A clock that only pauses move: by what was asked for, or to `wakes`; `slept` keeps the pauses."""

    def __init__(self, wakes: float | None = None) -> None:
        self.now, self.wakes = 0.0, wakes
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now = self.now + seconds if self.wakes is None else self.wakes


def rollout(index: int, metadata: dict | None = None) -> Rollout:
    prompt = Prompt(f"id-{index}", (1,), f"prompt {index}", {"n": index} if metadata is None else metadata)
    return Rollout(prompt, (1,), (0.0,), f"response {index}", "stop", 0, 0)


def length_scores(_: int, body: Any) -> Answer:
    """A good service: the score of an item is its `n`, halved."""
    return Answer({"scores": [item["metadata"]["n"] / 2 for item in body["items"]]})


def after(failures: list[Answer]) -> Callable[[int, Any], Answer]:
    """Fail so often, then serve well."""
    return lambda number, body: failures[number] if number < len(failures) else length_scores(number, body)


def reward(url: str, **settings: Any) -> HttpReward:
    return HttpReward(HttpJudge(kind="http", url=url, **settings))


def timed(source: HttpReward, clock: Clock) -> HttpReward:
    """Have a source live by another clock than the machine's."""
    source.endpoint = replace(source.endpoint, clock=clock, sleep=clock.sleep, breaker=Breaker(clock=clock))
    return source


def failure(source: HttpReward, count: int = 1) -> str:
    with pytest.raises(TrainingError) as error:
        source.score([rollout(n) for n in range(count)]).result()
    return str(error.value)


def test_every_response_is_scored_once_and_in_order():
    with LocalServer(length_scores) as server:
        scores = reward(f"{server.url}/score", batch_size=3).score([rollout(n) for n in range(8)]).result()
    assert scores.dtype == torch.float32
    assert scores.tolist() == [n / 2 for n in range(8)]
    batches = sorted((asked.body["items"] for asked in server.asked), key=lambda items: items[0]["metadata"]["n"])
    sent = [item for items in batches for item in items]
    assert sent == [{"prompt": f"prompt {n}", "response": f"response {n}", "metadata": {"n": n}} for n in range(8)]
    assert [len(items) for items in batches] == [3, 3, 2]
    assert all(asked.headers["Accept-Encoding"] == "identity" for asked in server.asked)
    assert {asked.path for asked in server.asked} == {"/score"}
    assert all(set(asked.body) == {"items"} for asked in server.asked)


def test_the_caller_does_not_wait_until_it_asks_for_the_result():
    asked = threading.Event()

    def answer(number: int, body: Any) -> Answer:
        assert asked.wait(60)
        return length_scores(number, body)

    with LocalServer(answer) as server:
        pending = reward(server.url, timeout_s=90).score([rollout(4)])
        asked.set()
        assert pending.result().tolist() == [2.0]


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_passing_failure_is_tried_again(status):
    with LocalServer(after([Answer({"error": "busy"}, status), Answer(b"", status)])) as server:
        assert reward(server.url).score([rollout(0), rollout(1)]).result().tolist() == [0.0, 0.5]
    assert len(server.asked) == 3
    assert server.asked[0].body == server.asked[1].body == server.asked[2].body


def test_a_batch_that_succeeded_is_not_sent_again_when_a_later_one_fails_at_first():
    with LocalServer(lambda n, body: Answer({}, 500) if n == 1 else length_scores(n, body)) as server:
        scores = reward(server.url, batch_size=1).score([rollout(n) for n in range(3)]).result()
    assert scores.tolist() == [0.0, 0.5, 1.0]
    asked = [asked.body["items"][0]["metadata"]["n"] for asked in server.asked]
    assert sorted(asked) == sorted([0, 1, 2, asked[1]])


def test_retry_after_in_seconds_is_honoured():
    clock = Clock()
    with LocalServer(after([Answer({}, 429, {"Retry-After": "100"})])) as server:
        timed(reward(server.url), clock).score([rollout(0)]).result()
    assert clock.slept == [100.0]


def test_retry_after_as_a_date_is_honoured():
    clock = Clock()
    when = format_datetime(datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1), usegmt=True)
    with LocalServer(after([Answer({}, 503, {"Retry-After": when})])) as server:
        timed(reward(server.url, deadline_s=7200), clock).score([rollout(0)]).result()
    assert len(clock.slept) == 1
    assert 3000 < clock.slept[0] <= 3600


def test_a_pause_that_the_deadline_does_not_allow_is_not_begun():
    clock = Clock()
    with LocalServer(after([Answer({}, 429, {"Retry-After": "3600"})])) as server:
        message = failure(timed(reward(server.url), clock))
    assert clock.slept == []
    assert message == f"{server.url}: status 429: {{}} (after 1 attempt, first prompt id id-0)"


def test_an_answer_that_hangs_is_given_up_and_asked_for_again():
    with LocalServer(after([Answer({}, delay=5.0)])) as server:
        assert reward(server.url, timeout_s=0.5).score([rollout(6)]).result().tolist() == [3.0]
    assert len(server.asked) >= 2


def test_a_service_that_stays_down_is_named_with_status_attempts_and_prompt():
    clock = Clock()
    with LocalServer(lambda number, body: Answer(b"out of\n memory", 500)) as server:
        message = failure(timed(reward(f"{server.url}/v1", deadline_s=100, batch_size=2), clock), count=2)
    count = len(server.asked)
    assert count == len(clock.slept) + 1 > 1
    assert clock.now <= 99
    assert message == f"{server.url}/v1: status 500: out of memory (after {count} attempts, first prompt id id-0)"


def test_an_attempt_without_useful_time_is_not_begun():
    clock = Clock(wakes=9.999)
    with LocalServer(lambda number, body: Answer(b"out of memory", 500)) as server:
        message = failure(timed(reward(server.url, deadline_s=10), clock))
    assert len(server.asked) == len(clock.slept) == 1
    assert message == f"{server.url}: status 500: out of memory (after 1 attempt, first prompt id id-0)"


def posted(endpoint: Endpoint, answer: Callable[[httpx.Request], Any]) -> str:
    """Return why an endpoint whose requests `answer` answers gives up."""

    async def post() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            await endpoint.post(http, {}, lambda content: content, "this")

    with pytest.raises(TrainingError) as error:
        asyncio.run(post())
    return str(error.value)


def test_an_attempt_that_the_deadline_cut_does_not_hide_the_services_answer():
    clock, asked = Clock(wakes=0.85), 0

    async def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        if asked == 1:
            return httpx.Response(500, stream=httpx.ByteStream(b"out of memory"))
        clock.now = 1.0
        await asyncio.sleep(600)
        raise AssertionError("the deadline did not cut the attempt")

    endpoint = Endpoint("http://here/v1", None, 30.0, 1.0, clock=clock, sleep=clock.sleep)
    assert posted(endpoint, answer) == "http://here/v1: status 500: out of memory (after 2 attempts, this)"
    assert asked == 2
    assert endpoint.breaker.last == "status 500: out of memory"


def test_silence_is_reported_with_the_longest_wait_that_the_service_was_given():
    clock = Clock()

    async def answer(request: httpx.Request) -> httpx.Response:
        clock.now += 0.1
        await asyncio.sleep(600)
        raise AssertionError("no attempt has an end")

    endpoint = Endpoint("http://here/v1", None, 0.1, 1.0, clock=clock, sleep=clock.sleep)
    message = posted(endpoint, answer)
    assert message == f"http://here/v1: no answer within 0.1 s (after {len(clock.slept) + 1} attempts, this)"


def test_a_deadline_shorter_than_the_timeout_ends_the_only_attempt():
    clock = Clock()

    async def answer(request: httpx.Request) -> httpx.Response:
        clock.now += 0.05
        await asyncio.sleep(600)
        raise AssertionError("the deadline did not cut the attempt")

    endpoint = Endpoint("http://here/v1", None, 30.0, 0.05, clock=clock, sleep=clock.sleep)
    assert posted(endpoint, answer) == "http://here/v1: no answer within 0.05 s (after 1 attempt, this)"


@pytest.mark.parametrize("status", [400, 401, 404, 422, 302])
def test_what_another_attempt_cannot_mend_fails_at_once(status):
    with LocalServer(lambda number, body: Answer({"detail": "no"}, status)) as server:
        message = failure(reward(server.url))
    assert len(server.asked) == 1
    assert message == f'{server.url}: status {status}: {{"detail": "no"}} (after 1 attempt, first prompt id id-0)'


def test_connection_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    message = failure(timed(reward(url), Clock()))
    assert message.startswith(f"{url}: ConnectError: ")
    assert "first prompt id id-0" in message


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"scores": [1.0]}, "but 1 scores for 2 items"),
        ({"scores": [1.0, 2.0, 3.0]}, "but 3 scores for 2 items"),
        ({"scores": []}, "but 0 scores for 2 items"),
        (b'{"scores": [1.0, NaN]}', "but in the answer scores.1: Input should be a finite number"),
        (b'{"scores": [Infinity, 1]}', "but in the answer scores.0: Input should be a finite number"),
        ({"scores": [0.5, 1e300]}, "but in the answer scores.1: Input should be less than or equal to 340282"),
        ({"scores": [0.5, None]}, "but in the answer scores.1: Input should be a valid number"),
        ({"scores": [0.5, "1"]}, "but in the answer scores.1: Input should be a valid number"),
        ({"scores": [0.5, True]}, "but in the answer scores.1: Input should be a valid number"),
        ({"score": [0.5, 1]}, "but in the answer scores: Field required"),
        ([0.5, 1], "but in the answer Input should be an object"),
        (b"<html>", "but in the answer Invalid JSON"),
        (b"", "but in the answer Invalid JSON"),
    ],
)
def test_an_answer_of_the_wrong_form_is_an_error_and_never_a_zero(body, said):
    with LocalServer(lambda number, _: Answer(body)) as server:
        message = failure(reward(server.url), count=2)
    assert message.startswith(f"{server.url}: status 200, {said}")
    assert message.endswith("(after 1 attempt, first prompt id id-0)")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer(b" " * 5000 + b'{"scores": [1]}'), "status 200, but the answer is longer than 0 MiB"),
        (Answer(gzip.compress(b" " * 10**7), headers={"Content-Encoding": "gzip"}),
         "status 200, but the answer is longer than 0 MiB"),
        (Answer(gzip.compress(b'{"scores": [1]}'), headers={"Content-Encoding": "GZIP"}),
         "status 200, but the answer is packed (gzip), which was not asked for"),
        (Answer(b"[" * 4000), "status 200, but in the answer Invalid JSON: recursion limit exceeded"),
        (Answer(b"\x1b]0;title\x07\x1b[31mred", 404), "status 404: ]0;title [31mred"),
        (Answer(b"<p>" * 1000, 404), f"status 404: {('<p>' * 1000)[:200]} (after"),
    ],
)  # fmt: skip
def test_what_is_read_and_what_is_shown_of_an_answer_is_bounded(monkeypatch, answer, said):
    monkeypatch.setattr("rlhf.rewards.http.LARGEST_ANSWER", 4096)
    with LocalServer(lambda number, body: answer) as server:
        assert failure(reward(server.url)).startswith(f"{server.url}: {said}")


def test_a_redirect_is_not_followed():
    with LocalServer(length_scores) as other:
        moved = Answer({}, 307, {"Location": other.url})
        with LocalServer(lambda number, body: moved) as server:
            assert failure(reward(server.url)).startswith(f"{server.url}: status 307")
    assert other.asked == []


def test_a_few_batches_are_asked_for_at_once():
    with LocalServer(lambda number, body: Answer(length_scores(number, body).body, delay=0.1)) as server:
        scores = reward(server.url, batch_size=1).score([rollout(n) for n in range(12)]).result()
    assert scores.tolist() == [n / 2 for n in range(12)]
    assert 2 <= server.most <= BATCHES_AT_ONCE


def test_batches_without_scores_are_nan_only_where_the_recipe_allows_it(caplog):
    def one_bad(_: int, body: Any) -> Answer:
        return Answer({}, 400) if body["items"][0]["metadata"]["n"] == 2 else length_scores(_, body)

    with LocalServer(one_bad) as server:
        source = reward(server.url, batch_size=2, on_error="skip_group")
        scores = source.score([rollout(n) for n in range(5)]).result().tolist()
        assert [scores[0], scores[1], scores[4]] == [0.0, 0.5, 2.0]
        assert [math.isnan(score) for score in scores] == [False, False, True, True, False]
        said = f"{server.url}: status 400: {{}} (after 1 attempt, first prompt id id-2)"
        assert source.failure == said
        assert f"{said}; the prompts of this batch are left out" in caplog.text
        assert failure(reward(server.url, batch_size=2), count=5) == said


def test_a_service_that_is_down_is_left_alone_and_asked_again_once_after_a_pause():
    down, clock = True, Clock()
    busy = Answer({}, 503, {"Retry-After": "3600"})
    with LocalServer(lambda number, body: busy if down else length_scores(number, body)) as server:
        source = timed(reward(server.url), clock)
        pause = source.endpoint.breaker.pause_s
        for _ in range(OPENS_AFTER):
            assert "(after 1 attempt, " in failure(source)
        said = f"{server.url}: status 503: {{}}; not asked, for that was failure 3 in a row: it is left alone for "
        assert failure(source).startswith(said)
        assert len(server.asked) == OPENS_AFTER
        clock.now += pause
        assert "(after 1 attempt, " in failure(source)
        assert "failure 4 in a row" in failure(source)
        assert len(server.asked) == OPENS_AFTER + 1
        clock.now += pause
        down = False
        assert source.score([rollout(4)]).result().tolist() == [2.0]
        down = True
        assert "not asked" not in failure(source)


def test_a_probe_has_one_attempt_and_everybody_else_waits_for_it():
    clock = Clock()
    breaker = Breaker(clock=clock)
    for _ in range(OPENS_AFTER - 1):
        breaker.failed("busy")
    breaker.succeeded()
    for _ in range(OPENS_AFTER - 1):
        breaker.failed("busy")
    assert breaker.refusal() is None
    assert not breaker.probing
    breaker.failed("busy")
    assert breaker.refusal().startswith("busy; not asked")
    clock.now += breaker.pause_s
    assert (breaker.refusal(), breaker.probing) == (None, True)
    assert breaker.refusal() is not None
    breaker.succeeded()
    assert (breaker.refusal(), breaker.probing) == (None, False)


def test_whole_numbers_are_numbers():
    with LocalServer(lambda number, body: Answer({"scores": [3, -1]})) as server:
        assert reward(server.url).score([rollout(0), rollout(1)]).result().tolist() == [3.0, -1.0]


def test_the_token_goes_into_the_header_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", f" {SECRET}\n")
    with LocalServer(lambda number, body: Answer({"you sent": f"Bearer {SECRET}"}, 401)) as server:
        source = reward(server.url, token_env="MY_TOKEN")
        message = failure(source)
    assert server.asked[0].headers["Authorization"] == f"Bearer {SECRET}"
    assert SECRET not in message + repr(source.endpoint) + repr(source.__dict__)
    assert '"Bearer ***"' in message


def test_a_secret_in_the_urls_query_is_not_repeated():
    with LocalServer(lambda number, body: Answer({}, 404)) as server:
        assert "hidden" not in failure(reward(f"{server.url}/s?key=hidden"))
    assert server.asked[0].path == "/s?key=hidden"


@pytest.mark.parametrize("value", [None, "", "  ", "caf\u00e9"])
def test_a_token_that_is_not_there_or_cannot_be_sent_is_a_recipe_error(monkeypatch, value):
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_TOKEN", value)
    with pytest.raises(RecipeError, match="the environment variable MY_TOKEN") as error:
        reward("http://localhost", token_env="MY_TOKEN")
    assert "caf" not in str(error.value)


def test_metadata_that_json_cannot_hold_is_a_data_error():
    with LocalServer(length_scores) as server:
        for metadata in ({"n": float("nan")}, {"when": datetime.now(UTC)}):
            with pytest.raises(DataError, match="prompt id id-3: its metadata cannot be sent"):
                reward(server.url).score([rollout(3, metadata)]).result()
    assert server.asked == []


@pytest.mark.parametrize(
    ("judge", "problem"),
    [
        ("{kind: http, url: 'ftp://host/x'}", "judge.url"),
        ("{kind: http, url: 'https://me:word@host/x'}", "judge.url"),
        ("{kind: http}", "judge.url"),
        ("{kind: http, url: 'http://host', batch_size: 0}", "judge.batch_size"),
        ("{kind: http, url: 'http://host', timeout: 3}", "did you mean timeout_s"),
    ],
)
def test_recipe_errors(tmp_path, judge, problem):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    stage = f"{{name: pairs, kind: annotate, policy: base, prompts: {{path: prompts.jsonl}}, judge: {judge}}}"
    (tmp_path / "recipe.yaml").write_text(f'name: t\nmodel: {{path: "tiny://llama"}}\nstages:\n  - {stage}\n')
    with pytest.raises(RecipeError, match=problem):
        load_recipe(tmp_path / "recipe.yaml", ())
