"""The gate before vLLM's server: which paths, which names, whose key."""

from __future__ import annotations

import asyncio

import pytest

from rlhf.serving.gate import HOSTS, KEY, Gate


def ask(path, headers=(), kind="http"):
    """Return the status that a request gets; 200 is the server behind the gate."""
    sent = []

    async def behind(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": kind, "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers]}
    asyncio.run(Gate(behind)(scope, None, send))
    return sent[0]["status"]


def bearer(key):
    return [("Host", "localhost:8000"), ("Authorization", f"Bearer {key}")]


@pytest.fixture(autouse=True)
def names(monkeypatch):
    monkeypatch.setenv(HOSTS, "127.0.0.1,localhost,[::1]")
    monkeypatch.delenv(KEY, raising=False)


def test_only_what_a_chat_needs_is_reachable():
    here = [("host", "127.0.0.1:8000")]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health"):
        assert ask(path, here) == 200
    for path in ("/v1/load_lora_adapter", "/invocations", "/metrics", "/tokenize", "/docs", "/v1/chat/completions/x"):
        assert ask(path, here) == 404
    assert ask("/v1/realtime", here, kind="websocket") == 404


def test_another_name_for_this_machine_is_refused():
    assert ask("/v1/models", [("Host", "evil.example:8000")]) == 403
    assert ask("/v1/models", []) == 403
    assert ask("/v1/models", [("Host", "[::1]:8000")]) == 200


def test_a_key_is_asked_for_everywhere_but_for_health(monkeypatch):
    monkeypatch.setenv(KEY, "geheim")
    assert ask("/v1/models", bearer("geheim")) == 200
    assert ask("/v1/models", bearer("falsch")) == 401
    assert ask("/v1/chat/completions", [("Host", "localhost")]) == 401
    assert ask("/v1/models", [("Host", "localhost"), ("Authorization", "Basic geheim")]) == 401
    assert ask("/health", [("Host", "localhost")]) == 200
    assert ask("/v1/models", bearer("ключ")) == 401


def test_without_names_any_is_good(monkeypatch):
    monkeypatch.delenv(HOSTS)
    assert ask("/v1/models", [("Host", "gpu-box:8000")]) == 200
