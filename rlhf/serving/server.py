"""vLLM's OpenAI-compatible server in a process of its own, from its start to its certain end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

from rlhf.activity import activity
from rlhf.engines.base import RolloutSpec
from rlhf.engines.environment import cpu_cache_bytes, vllm_environment
from rlhf.errors import ResourceError, TrainingError
from rlhf.recipe.role_schema import RolloutRole
from rlhf.recipe.vllm_build import check_device
from rlhf.serving.dtype import served_dtype
from rlhf.serving.gate import HEALTH, HOSTS, KEY
from rlhf.serving.plan import Serving
from rlhf.serving.worker import STARTED_BY
from rlhf.untrusted import printable

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLL_S = 0.5
LENGTH = 4096
"""Tokens that a model is taken for that does not say its own."""
LEAVES_S = 15.0
ERROR = re.compile(r"\b\w*(Error|Exception)\b: ")
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Endpoint:
    """Where the server listens; `key` is what requests must show, "" for none."""

    host: str
    port: int
    key: str = ""

    @property
    def url(self) -> str:
        """The base URL of its API."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/v1"

    @property
    def local(self) -> str:
        """A URL at which this machine reaches it."""
        host = WILDCARDS.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK


@dataclass(frozen=True)
class Limits:
    """What the server may take: `threads` of the CPU, and tokens of prompt and answer (None: what the model has).

    `ready_s` is how many seconds it may make no progress until it is ready, and may take for its first answers.
    """

    threads: int
    max_length: int | None = None
    ready_s: float = 900.0


def free_port(host: str, port: int) -> int:
    """Return `port`, or one that is free for 0; ResourceError where it is taken or the host is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ResourceError(f"cannot listen on port {port} of {host}: {why}; choose another with --port") from error
        return int(probe.getsockname()[1])


@contextmanager
def running(serving: Serving, endpoint: Endpoint, limits: Limits) -> Iterator[Server]:
    """Start the server and wait until every model has answered; it and all its processes end with the context.

    Raises:
        ResourceError: the installed vLLM is not made for this machine.
        TrainingError: vLLM ended or hangs, or a model cannot answer.
    """
    check_device("the server", gpus=Path("/dev/nvidiactl").exists())
    with tempfile.NamedTemporaryFile("w+", prefix="rlhf-serve-", suffix=".log", errors="replace") as log:
        server = Server(_start(serving, endpoint, limits, log), Path(log.name))
        try:
            server.wait_ready(serving, endpoint, limits.ready_s)
            yield server
        finally:
            server.stop()


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    def wait_ready(self, serving: Serving, endpoint: Endpoint, ready_s: float) -> None:
        """Return when every model has answered once: some models fail only then.

        Raises:
            TrainingError: it ended, or made no progress for `ready_s`, or a model cannot answer. Progress is a line in
                its log, or that its processes read, write or hold other bytes than before.
        """
        seen, since = self._progress(), time.monotonic()
        while not self._healthy(endpoint):
            self.check()
            if (now := self._progress()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > ready_s:
                raise TrainingError(
                    f"vLLM is not ready and has made no progress for {ready_s:g} s (--ready-timeout); it said last:\n"
                    f"{self.last_lines() or 'nothing'}"
                )
            time.sleep(POLL_S)
        headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
        for name in serving.names:
            question = {"model": name, "prompt": "Hello", "max_tokens": 1}
            try:
                answer = httpx.post(
                    f"{endpoint.local}/v1/completions",
                    json=question,
                    headers=headers,
                    timeout=ready_s,
                    trust_env=False,  # it is on this machine: no proxy
                )
            except httpx.HTTPError as error:
                raise TrainingError(f"vLLM does not answer for {name}: {self.last_words() or error}") from error
            if answer.status_code != httpx.codes.OK:
                raise TrainingError(f"vLLM cannot answer for {name}: {self.last_words() or answer.text[:300]}")

    def wait(self) -> None:
        """Return never while it runs; TrainingError when it ends."""
        while True:
            self.check()
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raise TrainingError where it has ended."""
        if (code := self.process.poll()) is not None:
            raise TrainingError(f"vLLM's server ended with code {code}: {self.last_words() or 'it said nothing'}")

    def last_words(self) -> str:
        """Return the last error that it wrote, one line."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line[ERROR.search(line).start() :] for line in lines if ERROR.search(line)]  # type: ignore[union-attr]
        useful = [line for line in errors if "Engine core" not in line and "EngineDead" not in line]
        return printable((useful or errors or lines or [""])[-1], 400)

    def last_lines(self, count: int = 4) -> str:
        """Return the last lines that it wrote, each cut to a length that a terminal shows."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(printable(line, 400) for line in lines[-count:])

    def _progress(self) -> tuple[int, ...]:
        return self.log.stat().st_size, *activity(self.process.pid)

    def stop(self) -> None:
        """End it and every process that it started: asked first, and by force after `LEAVES_S`."""
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(LEAVES_S)
            for process in psutil.wait_procs(family, 1.0)[1]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # the system may hold one back that waits for a disk
            self.process.wait(LEAVES_S)

    @staticmethod
    def _healthy(endpoint: Endpoint) -> bool:
        try:
            return httpx.get(endpoint.local + HEALTH, timeout=5, trust_env=False).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


def _start(serving: Serving, endpoint: Endpoint, limits: Limits, log: IO[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf.serving.worker", *arguments(serving, endpoint, limits)],
        env=environment(serving, endpoint, limits),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def arguments(serving: Serving, endpoint: Endpoint, limits: Limits) -> list[str]:
    """Return the arguments of vLLM's server: no code of the model's, no other origin, no adapters but these."""
    adapters = [json.dumps({"name": name, "path": str(folder)}) for name, folder in serving.adapters.items()]
    count = str(len(adapters))
    lora = ["--enable-lora", "--max-lora-rank", str(serving.rank), "--max-loras", count, "--max-cpu-loras", count]
    return [
        *("--model", str(serving.folder)),
        *("--served-model-name", serving.name),
        *("--host", endpoint.host, "--port", str(endpoint.port)),
        *("--load-format", "safetensors"),
        *("--dtype", _spec(serving.folder, limits).dtype),  # "auto" would serve float32 rounded
        *("--max-model-len", str(limits.max_length or "auto")),
        *("--middleware", "rlhf.serving.gate.Gate"),
        *("--disable-fastapi-docs", "--disable-uvicorn-access-log", "--uvicorn-log-level", "error"),
        *(() if Path("/dev/nvidiactl").exists() else _on_cpu(serving, limits)),
        *((*lora, "--lora-modules", *adapters) if adapters else ()),
    ]


def _on_cpu(serving: Serving, limits: Limits) -> tuple[str, ...]:
    cache = str(cpu_cache_bytes(_spec(serving.folder, limits)))
    return "--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", cache


def environment(serving: Serving, endpoint: Endpoint, limits: Limits) -> Mapping[str, str]:
    """Return the environment of the server's process; the key is in it and never among the arguments."""
    own = {
        **vllm_environment(_spec(serving.folder, limits)),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
        "VLLM_SERVER_DEV_MODE": "0",
        STARTED_BY: str(os.getpid()),
        KEY: endpoint.key,
        HOSTS: ",".join((*LOOPBACK[:2], "[::1]")) if endpoint.on_loopback else "",
    }
    return {**os.environ, **own}


def _spec(folder: Path, limits: Limits) -> RolloutSpec:
    """Return the engine as a run would have it, by which its memory on the CPU is reckoned."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    length = limits.max_length or config.get("max_position_embeddings") or LENGTH
    return RolloutSpec(folder, served_dtype(folder), RolloutRole(), length, limits.threads, seed=0)
