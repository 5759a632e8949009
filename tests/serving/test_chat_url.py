"""`rlhf chat --url` with a server that means harm: what it says cannot act, and it learns no more than it must."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rlhf.errors import DataError, RecipeError
from rlhf.serving.talk import Style, served_talkers

ROOT = Path(__file__).parents[2]
ACTS = "\x1b]0;owned\x07\x1b[2J\x1b]52;c;aGk=\x07\x9b8m\u202e[bold]x[/bold][/]"
SPELT = "<U+001B>]0;owned<U+0007><U+001B>[2J<U+001B>]52;c;aGk=<U+0007><U+009B>8m<U+202E>[bold]x[/bold][/]"
LIMIT_S = 120


class Hostile:
    """An endpoint with as many models as asked for; the second question of a conversation is refused."""

    def __init__(self, models: int = 1, status: int = 200) -> None:
        self.names = [f"model{n}{ACTS}" for n in range(models)]
        self.headers: list[Mapping[str, str]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                owner.headers.append({name.lower(): value for name, value in self.headers.items()})
                self.reply(status, json.dumps({"data": [{"id": name, "object": "model"} for name in owner.names]}))

            def do_POST(self) -> None:
                owner.headers.append({name.lower(): value for name, value in self.headers.items()})
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if len(body["messages"]) > 1:
                    self.reply(400, json.dumps({"error": {"message": f"refused {ACTS}"}}))
                    return
                pieces = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in ("said ", ACTS)]
                self.reply(200, "".join(f"data: {json.dumps(one)}\n\n" for one in pieces) + "data: [DONE]\n\n")

            def reply(self, code: int, text: str) -> None:
                self.send_response(code)
                self.send_header("Content-Length", str(len(text.encode())))
                self.send_header("Content-Type", "text/event-stream" if text.startswith("data") else "application/json")
                if code == 307:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(params=[1, 2])
def hostile(request: pytest.FixtureRequest) -> Iterator[Hostile]:
    server = Hostile(request.param)
    yield server
    server.end()


def typed(command: list[str], lines: list[tuple[str, str]]) -> str:
    """Run a command in a terminal, type each line once its text has been seen, and return all that arrived."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, close_fds=True)
    os.close(theirs)
    seen, ends = b"", time.monotonic() + LIMIT_S
    waiting, at = list(lines), 0
    while time.monotonic() < ends:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # the other end has closed
                break
        if waiting and waiting[0][0].encode() in seen[at:]:
            at = len(seen)
            os.write(ours, waiting.pop(0)[1].encode())
    process.kill()
    process.wait()
    os.close(ours)
    assert not waiting, seen[-2000:]
    return seen.decode(errors="replace")


def test_names_answers_and_refusals_of_a_server_cannot_act(hostile: Hostile) -> None:
    command = [sys.executable, "-m", "rlhf.cli", "chat", "--url", hostile.url]
    said = typed(command, [("> ", "hello\n"), ("> ", "again\n"), ("refused", "/quit\n")])
    flat = "".join(said.split())
    assert flat.count(SPELT) >= (3 if len(hostile.names) == 1 else 4)  # names, answers (wrapped in panels), the refusal
    assert not {"\x07", "\x9b", "\u202e"} & set(said.replace(chr(0xFFFD), ""))
    assert "\x1b]" not in said
    assert "\x1b[2J" not in said
    assert "Traceback" not in said


def test_a_server_learns_nothing_that_is_for_openai(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "BASE_URL"):
        monkeypatch.setenv(f"OPENAI_{name}", f"mine-{name}")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: mine-header")
    server = Hostile()
    try:
        (talker,) = served_talkers(server.url, [], "key-of-the-server")
        assert "".join(talker.reply([{"role": "user", "content": "hello"}], Style())) == f"said {ACTS}"
    finally:
        server.end()
    assert len(server.headers) == 2
    assert [headers["authorization"] for headers in server.headers] == ["Bearer key-of-the-server"] * 2
    assert "mine-" not in json.dumps(server.headers)
    assert os.environ["OPENAI_ORG_ID"] == "mine-ORG_ID"


def test_a_redirect_is_not_followed() -> None:
    server = Hostile(status=307)
    try:
        with pytest.raises((RecipeError, DataError)):
            served_talkers(server.url, [], "key-of-the-server")
    finally:
        server.end()
    assert len(server.headers) == 1
