"""What of vLLM's server is reachable, and by whom: a middleware in the server's process, before everything else."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = "/health"
PATHS = (HEALTH, "/v1/models", "/v1/completions", "/v1/chat/completions")
KEY = "VLLM_API_KEY"
"""Variable with the key that requests must show; without one, who reaches the port may ask."""
HOSTS = "RLHF_SERVE_HOSTS"
"""Variable with the names, separated by commas, under which requests may address the server; unset is any."""


class Gate:
    """Lets through the paths of `PATHS`, under the right name and with the key, where there is one.

    vLLM's own key leaves other paths open that answer all the same. A page in a browser on this machine may resolve a
    name of its own to it (DNS rebinding): on loopback such a name is refused.
    """

    def __init__(self, app: App) -> None:
        self.app = app
        self.key = os.environ.get(KEY, "")
        self.hosts = [name for name in os.environ.get(HOSTS, "").split(",") if name]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that may not pass; hand on any other."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["type"] != "http" or scope["path"] not in PATHS:
            await _refuse(send, 404, "no such path")
        elif self.hosts and _name(headers.get("host", "")) not in self.hosts:
            await _refuse(send, 403, "this server goes by another name")
        elif self.key and scope["path"] != HEALTH and not self._shown(headers.get("authorization", "")):
            await _refuse(send, 401, "the key is missing or wrong")
        else:
            await self.app(scope, receive, send)

    def _shown(self, authorization: str) -> bool:
        scheme, _, shown = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(shown.strip().encode(), self.key.encode())


def _name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
