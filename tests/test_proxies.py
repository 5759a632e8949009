"""A real proxy in the environment: it sees nothing of what goes to this machine, and gets what goes elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from rlhf import proxies
from rlhf.errors import ResourceError
from rlhf.proxies import bypass, is_local, proxy_for
from rlhf.rewards.http import Endpoint, client

ROOT = Path(__file__).parents[1]
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy")
SECRET = "bearer-of-mine"


class Server:
    """Answers every request, as a proxy would for a whole URL, and keeps what was asked for and with which header."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                owner.asked.append((self.path, self.headers.get("Authorization", "")))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.dumps({"data": [{"id": "m", "object": "model"}], "ray_version": "2"}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_CONNECT = answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def end(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.end()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A proxy that all variables name, none of them with an exception."""
    made = Server()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://me:proxy-password@127.0.0.1:{made.port}")
    proxies._say.cache_clear()
    yield made
    made.end()


LOCAL = ["127.0.0.1", "127.8.9.10", "localhost", "LOCALHOST.", "a.localhost", "::1", "[::1]", "169.254.169.254"]
LOCAL += ["fe80::1", "fe80::1%eth0", "::ffff:127.0.0.1", "0.0.0.0", "::", "127.1", "0x7f000001", "2130706433"]


@pytest.mark.parametrize("host", LOCAL)
def test_what_stays_on_this_machine_or_its_link(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "localhost.example", "judge.example", "2001:db8::1", "128.0.0.1", ""])
def test_what_does_not(host: str) -> None:
    assert not is_local(host)


def post(url: str, token: str = SECRET) -> None:
    async def ask() -> None:
        async with client(url, 1) as http:
            await Endpoint(url, token, 10.0, 10.0).post(http, {}, lambda content: content, "this")

    asyncio.run(ask())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1"])
def test_a_judge_on_this_machine_is_asked_past_the_proxy(proxy: Server, server: Server, host: str) -> None:
    post(f"http://{host}:{server.port}/score")
    assert proxy.asked == []
    assert server.asked == [("/score", f"Bearer {SECRET}")]


def test_a_name_for_this_machine_alone_is_asked_past_the_proxy(
    proxy: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.1.1 Workstation.example workstation # mine\n127.0.0.1 both\n10.0.0.5 both\n::1 six\nx y\n")
    monkeypatch.setattr(proxies, "HOSTS", hosts)
    for host in ("workstation", "workstation.example", "six"):
        assert proxy_for(f"http://{host}:8000/score") is None
    for host in ("both", "y", "mine", "other"):
        assert proxy_for(f"http://{host}:8000/score") is not None
    hosts.unlink()
    assert proxy_for("http://workstation:8000/score") is not None


def test_others_go_through_it_and_that_is_said_once(proxy: Server, caplog: pytest.LogCaptureFixture) -> None:
    post("http://judge.invalid/score")
    post("http://judge.invalid/score")
    assert proxy.asked == [("http://judge.invalid/score", f"Bearer {SECRET}")] * 2
    said = f"judge.invalid is asked through the proxy http://127.0.0.1:{proxy.port} of the environment"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize(
    ("exceptions", "url", "direct"),
    [
        ("judge.invalid", "http://judge.invalid/score", True),
        (".invalid", "http://judge.invalid/score", True),
        ("*", "http://judge.invalid/score", True),
        ("other.invalid, judge.invalid:8000", "http://judge.invalid:8000/score", True),
        ("judge.invalid:8000", "http://judge.invalid:9000/score", False),
        ("10.0.0.0/8", "http://10.1.2.3:8000/score", True),
        ("10.0.0.0/8", "http://11.1.2.3:8000/score", False),
        ("2001:db8::/32", "http://[2001:db8::5]:8000/score", True),
        ("nvalid", "http://judge.valid/score", False),
    ],
)
def test_exceptions_of_the_environment_hold(
    proxy: Server, monkeypatch: pytest.MonkeyPatch, exceptions: str, url: str, direct: bool
) -> None:
    monkeypatch.setenv("NO_PROXY", exceptions)
    assert (proxy_for(url) is None) == direct


@pytest.mark.parametrize(
    ("value", "why"), [("ftp://h:1", "of a kind that is not known: ftp"), ("http://h:port", "is no URL")]
)
def test_a_proxy_that_cannot_be_used_is_an_error_for_other_hosts_alone(
    proxy: Server, monkeypatch: pytest.MonkeyPatch, value: str, why: str
) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError, match=why):
        proxy_for("http://judge.invalid/score")
    assert proxy_for("http://127.0.0.1/score") is None


def test_chat_goes_the_same_ways(proxy: Server, server: Server) -> None:
    from rlhf.serving.talk import served_talkers

    assert [talker.name for talker in served_talkers(f"http://127.0.0.1:{server.port}", [], SECRET)] == ["m"]
    assert proxy.asked == []
    assert [talker.name for talker in served_talkers("http://llm.invalid", [], "key-for-llm")] == ["m"]
    assert proxy.asked == [("http://llm.invalid/v1/models", "Bearer key-for-llm")]


def test_serve_asks_its_own_server_past_the_proxy(proxy: Server, server: Server) -> None:
    from rlhf.serving.server import Endpoint as Served
    from rlhf.serving.server import Server as Running

    assert Running._healthy(Served("127.0.0.1", server.port, SECRET))
    assert proxy.asked == []
    assert len(server.asked) == 1


SUBMIT = """
import sys
from ray.job_submission import JobSubmissionClient
from actors.submit import check_answers
from rlhf.proxies import bypass
check_answers(sys.argv[1])
bypass(sys.argv[1])
try:
    JobSubmissionClient(sys.argv[1]).get_job_info("x")
except Exception:
    pass
"""


def test_submit_reaches_a_cluster_on_this_machine_past_the_proxy(proxy: Server, server: Server) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    address = f"http://127.0.0.1:{server.port}"
    subprocess.run([sys.executable, "-c", SUBMIT, address], env=environment, check=True, timeout=120)
    assert len(server.asked) >= 2
    assert proxy.asked == []


def test_bypass_is_for_local_hosts_alone(proxy: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "mine")
    monkeypatch.setenv("no_proxy", "mine")
    bypass("http://head.invalid:8265")
    assert os.environ["NO_PROXY"] == "mine"
    bypass("http://127.0.0.1:8265")
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "mine,127.0.0.1"


def test_no_client_reads_the_environment_by_itself() -> None:
    """Every use of httpx says where it goes; a library's client gets ours."""
    import ast

    for path in sorted(path for package in ("rlhf", "actors") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute | ast.Name):
                continue
            name = ast.unparse(node.func)
            if name in {f"httpx.{verb}" for verb in ("get", "post", "stream", "Client", "AsyncClient")} or (
                name.endswith("DefaultHttpxClient")
            ):
                assert "trust_env" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}: {name}"
            assert name.partition(".")[0] not in ("requests", "aiohttp"), f"{path}:{node.lineno}: {name}"
            if name in ("OpenAI", "openai.OpenAI"):
                assert "http_client" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}: {name}"
    assert httpx.__version__
