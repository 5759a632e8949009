"""A reward server that misbehaves in every way we know, and what the run makes of it."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as WaitTimeout
from dataclasses import dataclass
from threading import Thread
from typing import Any, Self

import torch

from rlhf.algorithms.advantages import group_normalised
from rlhf.errors import GuardError, TrainingError
from rlhf.recipe.base import HttpJudge
from rlhf.rewards.remote import HttpReward
from rlhf.rewards.skips import Skips
from rlhf.types import Prompt, Rollout
from tests.chaos.row import Row, only

COUNT = 1000
PROMPTS, SAMPLES = 3, 2
TIMEOUT_S, DEADLINE_S, HANG_S = 0.4, 1.0, 30.0
AT_ONCE = 32
BIG = b" " * 2**20

Writer = asyncio.StreamWriter
Fault = Callable[[Writer, int], Awaitable[None]]


def truth(case: int, row: int) -> float:
    """Return the score of a response: never 0, another one for each, and exact in float32."""
    return 1 + case + row / 8


def http(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def says(status: str, body: bytes, *headers: str) -> Fault:
    async def fault(writer: Writer, port: int) -> None:
        writer.write(http(status, body, *(header.format(port=port) for header in headers)))

    return fault


def raw(content: bytes) -> Fault:
    async def fault(writer: Writer, port: int) -> None:
        writer.write(content)

    return fault


async def hang(writer: Writer, port: int) -> None:
    await asyncio.sleep(2 * TIMEOUT_S)


async def reset(writer: Writer, port: int) -> None:
    writer.transport.abort()


async def drip(writer: Writer, port: int) -> None:
    for byte in http("200 OK", b'{"scores": [0.0, 0.0]}'):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(TIMEOUT_S / 20)


async def endless(writer: Writer, port: int) -> None:
    writer.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"scores": [0.0, 0.0')
    for _ in range(64):
        writer.write(BIG)
        await writer.drain()


def scores(text: str) -> Fault:
    return says("200 OK", b'{"scores": ' + text.encode() + b"}")


BOMB = gzip.compress(b'{"scores": [0.0, 0.0' + b" " * 2**24 + b"]}", compresslevel=1)
HALF = b'HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"scores": [0.0, 0.0]}'
PASSING: dict[str, Fault] = {
    "hang": hang,
    "reset": reset,
    "drip": drip,
    "nothing": raw(b""),
    "half an answer": raw(HALF),
    "no HTTP": raw(b"\x00\xff\x00 220 smtp ready\r\n\r\n"),
    "huge header": raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**18),
    "500": says("500 Internal Server Error", b'{"scores": [0.0, 0.0]}'),
    "502 with HTML": says("502 Bad Gateway", b"<html><script>alert(1)</script></html>"),
    "503": says("503 Service Unavailable", b"", "Retry-After: 0.1"),
    "429": says("429 Too Many Requests", b"slow down", "Retry-After: 0"),
    "429 for an hour": says("429 Too Many Requests", b"", "Retry-After: 3600"),
    "503 until nonsense": says("503 Service Unavailable", b"", "Retry-After: soon"),
}
LASTING: dict[str, Fault] = {
    **{
        f"scores {text}": scores(text)
        for text in (
            "[NaN, 1.0]", "[1.0, Infinity]", "[-Infinity, 1]",
            "[1e39, 1.0]", "[1e999, 1.0]", '["0", "0"]', '["nan", 1]',
            "[null, null]", "[false, true]", "[[0.0], [0.0]]", "[[0.0, 0.0]]", "[0.0]", "[0.0, 0.0, 0.0]", "[]", "null",
            "0", '{"0": 0.0, "1": 0.0}', '[{"score": 0}, {"score": 0}]', "[0.0, 0.0", "[0.0, 0.0,]", "[00, 0]",
        )
    },
    "HTML": says("200 OK", b"<!doctype html><h1>It works</h1>", "Content-Type: text/html"),
    "no body": says("200 OK", b""),
    "no content": says("204 No Content", b""),
    "an error with 200": says("200 OK", b'{"error": "model not loaded"}'),
    "a bare list": says("200 OK", b"[0.0, 0.0]"),
    "two answers": says("200 OK", b'{"scores": [0.0, 0.0]}{"scores": [0.0, 0.0]}'),
    "UTF-16": says("200 OK", '{"scores": [0.0, 0.0]}'.encode("utf-16")),
    "bytes": says("200 OK", bytes(range(256))),
    "deep": says("200 OK", b'{"scores": ' + b"[" * 50_000),
    "escapes": says("404 Not Found", b"\x1b]0;owned\x07\x1b[2J"),
    "401": says("401 Unauthorized", b'{"scores": [0.0, 0.0]}'),
    "redirect to zeros": says("307 Temporary Redirect", b"", "Location: http://localhost:{port}/zeros"),
    "moved to zeros": says("301 Moved Permanently", b"", "Location: /zeros"),
    "gzip bomb": says("200 OK", BOMB, "Content-Encoding: gzip"),
    "huge": endless,
}  # fmt: skip
FAULTS = PASSING | LASTING


@dataclass(frozen=True)
class Case:
    """The fault of each prompt's batch, how often it comes before the service is well again, and `on_error`."""

    number: int
    faults: tuple[tuple[str, int], ...]
    skips: bool

    def rollouts(self) -> list[Rollout]:
        """Return the responses to score, two to a prompt."""
        metadata = [{"case": self.number, "row": row} for row in range(PROMPTS * SAMPLES)]
        prompts = [Prompt(f"{self.number}-{m['row'] // SAMPLES}", (1,), "question", m) for m in metadata]
        return [Rollout(prompt, (1, 2), (-1.0, -1.0), "answer", "stop", 0, 0) for prompt in prompts]


def make_case(number: int, rng: random.Random) -> Case:
    """Draw a case: at least one prompt's batch meets a fault, once, twice or for ever."""
    bad = rng.randint(1, PROMPTS)
    faults = [(_fault(rng), rng.choice((1, 1, 2, 99))) for _ in range(bad)] + [("", 0)] * (PROMPTS - bad)
    rng.shuffle(faults)
    return Case(number, tuple(faults), skips=number % 2 == 1)


def _fault(rng: random.Random) -> str:
    """Draw a fault that another attempt may not meet as often as one that lasts."""
    return rng.choice(list(PASSING if rng.random() < 2 / 3 else LASTING))


class Server:
    """Serves the cases: each batch its faults, then the true scores; `bad` counts the faulty answers by kind."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases = cases
        self.bad: Counter[str] = Counter()
        self.asked: Counter[tuple[int, int]] = Counter()
        self.loop = asyncio.new_event_loop()
        self.thread = Thread(target=self.loop.run_forever, daemon=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
            body = json.loads(await reader.readexactly(int(head.partition("content-length:")[2].split()[0])))
            rows = [item["metadata"] for item in body["items"]]
            case, group = rows[0]["case"], rows[0]["row"] // SAMPLES
            name, times = self.cases[case].faults[group]
            self.asked[case, group] += 1
            if "/zeros" in head.split()[1]:
                writer.write(http("200 OK", b'{"scores": [0.0, 0.0]}'))
            elif self.asked[case, group] <= times:
                self.bad[name] += 1
                await FAULTS[name](writer, self.port)
            else:
                good = {"scores": [truth(case, row["row"]) for row in rows]}
                writer.write(http("200 OK", json.dumps(good).encode()))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client has gone: it had waited long enough, or heard enough; or the server ends
        finally:
            writer.close()

    def __enter__(self) -> Self:
        self.thread.start()
        start = asyncio.start_server(self._answer, "127.0.0.1", 0, backlog=512)
        self.server = asyncio.run_coroutine_threadsafe(start, self.loop).result()
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self.server.close)
        asyncio.run_coroutine_threadsafe(self._drop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def _drop(self) -> None:
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def drive(case: Case, url: str) -> Counter[str]:
    """Score a case as a step of training does, up to the advantages, and count what came of it."""
    settings: dict[str, Any] = {"on_error": "skip_group", "max_skipped": 0.7} if case.skips else {}
    judge = HttpJudge(kind="http", url=url, batch_size=SAMPLES, timeout_s=TIMEOUT_S, deadline_s=DEADLINE_S, **settings)
    source, rollouts = HttpReward(judge), case.rollouts()
    try:
        found = source.score(rollouts).result(timeout=HANG_S)  # type: ignore[call-arg]
        skips = Skips(source)
        rows = skips.kept(found, rollouts)
    except (TrainingError, GuardError) as error:
        said = str(error)
        clear = said.isprintable() and len(said) < 500 and f"prompt id {case.number}-" in said
        return Counter({"errors said": 1, "unclear errors": int(not clear)})
    except WaitTimeout:
        return Counter(hangs=1)
    except Exception as error:
        logging.getLogger("chaos").exception("case %s", case)
        return Counter({f"surprises ({type(error).__name__})": 1})
    kept = found[rows]
    right = torch.tensor([truth(case.number, row) for row in rows])
    advantages = group_normalised(kept, torch.arange(len(rows)) // SAMPLES)
    return Counter(
        {
            "recovered by retry": int(not skips.skipped),
            "groups skipped": skips.skipped,
            "silent zeros": int((kept == 0).sum()),
            "wrong scores": int((kept != right).sum()),
            "NaN in the loss": int((~advantages.isfinite()).sum()),
        }
    )


def run(count: int, rng: random.Random) -> Row:
    """Meet `count` misbehaving services, half of them with each `on_error`."""
    logging.getLogger("rlhf").addHandler(logging.NullHandler())
    cases = [make_case(number, rng) for number in range(count)]
    seen: Counter[str] = Counter()
    with Server(cases) as server, ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(lambda case: drive(case, f"http://127.0.0.1:{server.port}/score"), cases):
            seen += outcome
    never = ("silent zeros", "wrong scores", "NaN in the loss", "unclear errors", "hangs")
    counts = {"injected": count, "bad answers": server.bad.total(), "kinds": len(server.bad)}
    counts |= {name: seen[name] for name in ("recovered by retry", "errors said", "groups skipped", *never)}
    counts |= {name: number for name, number in seen.items() if name.startswith("surprises")}
    passed = server.bad.total() >= count and not any(seen[name] for name in never)
    passed = passed and not any(name.startswith("surprises") for name in counts)
    return Row("misbehaving reward servers", f"{count}: 0 silent zeros, 0 NaN in the loss", counts, passed)


if __name__ == "__main__":
    only(run, COUNT)
