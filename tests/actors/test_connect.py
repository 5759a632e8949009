"""Who may talk to Ray: a Ray of the run's own asks for its token whatever the environment says, a cluster is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from nodes import environment, free_ports

ROOT = Path(__file__).parents[2]
LIMIT_S = 240
RECIPE = """
import logging, os, sys
from actors.connect import connect
from rlhf.recipe.placement import place
from rlhf.recipe.schema import Recipe
def recipe(address):
    stage = {"name": "sft", "kind": "sft", "data": {"path": "rows.jsonl"}}
    return Recipe.model_validate(
        {"name": "t", "model": {"path": "tiny://llama"}, "stages": [stage], "ray": {"address": address}})
def enter(address=None):
    return connect(recipe(address), ())
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("rlhf").addHandler(Keep())
"""
OWN = (
    RECIPE
    + """
import json, re, subprocess
import httpx, psutil, ray
from actors.authentication import asks_token
NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED")
kept = dict(os.environ)
connection = enter()
found = {"asks": asks_token(ray.get_runtime_context().gcs_address)}
found["token"] = os.environ["RAY_AUTH_TOKEN"]
listening = []
for process in psutil.Process().children(recursive=True):
    listening += [(c.laddr.ip, c.laddr.port) for c in process.net_connections("inet") if c.status == "LISTEN"]
found["listening"] = sorted({ip for ip, _ in listening})
job = {"entrypoint": f"touch {sys.argv[1]}"}
answers = {}
for _, port in set(listening):
    try:
        answer = httpx.post(f"http://127.0.0.1:{port}/api/job_agent/jobs/", json=job, timeout=10, trust_env=False)
        answers[port] = answer.status_code
    except httpx.HTTPError:
        pass  # not HTTP
found["answers"] = list(answers.values())
found["worker"] = ray.get(ray.remote(lambda: os.environ.get("RAY_AUTH_MODE")).remote())
connection.close(failed=False)
found["changed"] = sorted(name for name in {*kept, *os.environ} if os.environ.get(name) != kept.get(name))
from ray._raylet import get_authentication_mode
found["after"] = str(get_authentication_mode())
print(json.dumps(found))
"""
)
JOIN = (
    RECIPE
    + """
import json, ray
from rlhf.errors import ResourceError
plain = dict(os.environ)
for address, variables in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(plain | variables)
    said.clear()
    before = os.environ.get("RAY_AUTH_MODE")
    try:
        connection = enter(address)
        said.insert(0, f"joined {len(ray.nodes())}")
        connection.close(failed=False)
    except ResourceError as error:
        said.insert(0, f"refused {error}")
    assert os.environ.get("RAY_AUTH_MODE") == before
    print(json.dumps(said))
"""
)
OPEN = ["joined 1", "this Ray cluster has no token authentication: anyone who reaches it can run code on it"]


def run(script: str, *arguments: str, **variables: str) -> list[Any]:
    """Return the lines of JSON that a script prints."""
    env = environment(PYTHONPATH=str(ROOT), **variables)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=env, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> dict[str, Any]:
    """What a Ray of a run's own is like where the environment forbids authentication and has a token of the user's."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("u" * 64)
    mark = home / "executed"
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": str(home / ".ray" / "auth_token")}
    variables |= {"RAY_AUTH_TOKEN": "", "RAY_ENABLE_K8S_TOKEN_AUTH": "1", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    (found,) = run(OWN, str(mark), HOME=str(home), **variables)
    return found | {"executed": mark.exists()}


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_ray_of_its_own_asks_for_a_token_of_its_own(own):
    assert own["asks"] is True
    assert len(own["token"]) == 64
    assert own["token"] != "u" * 64
    assert own["worker"] == "token"


@pytest.mark.ray
def test_nothing_of_it_takes_a_command_without_the_token(own):
    assert own["answers"], "no HTTP server was found"
    assert set(own["answers"]) <= {401, 404, 405}
    assert 401 in own["answers"]
    assert not own["executed"]


@pytest.mark.ray
def test_all_of_it_listens_on_loopback(own):
    assert own["listening"]
    assert set(own["listening"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


@pytest.mark.ray
def test_the_environment_is_as_before_when_it_has_ended(own):
    assert own["changed"] == []
    assert own["after"].endswith("DISABLED") or own["after"] == "0"


@contextmanager
def head(folder: Path, ip: str, **variables: str) -> Iterator[str]:
    """Start a head without dashboard and yield its address; it ends with the context."""
    port, client = free_ports(2)
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
        "--include-dashboard=false",
        "--num-cpus=1",
    ]
    command += [f"--node-ip-address={ip}", f"--port={port}", f"--temp-dir={folder}", "--dashboard-agent-listen-port=0"]
    log = folder.with_suffix(".log")
    with log.open("w") as out:
        node = subprocess.Popen(
            [*command, f"--ray-client-server-port={client}"], env=environment(**variables), stdout=out, stderr=out
        )
    try:
        yield f"{ip}:{port}"
    finally:
        node.terminate()
        node.wait(timeout=60)


def wait(address: str, limit_s: float = 120.0) -> None:
    """Wait until a head answers."""
    from nodes import until

    from actors.authentication import asks_token
    from rlhf.errors import ResourceError

    def answers() -> bool:
        try:
            asks_token(address)
        except ResourceError:
            return False
        return True

    until(answers, limit_s, address)


@pytest.mark.ray
@pytest.mark.timeout(500)
def test_the_warning_is_about_the_cluster_and_not_about_the_environment(tmp_path_factory):
    """Each source of a token, and none, with each kind of cluster; where `RAY_AUTH_MODE` is set it is wrong."""
    token = "t" * 64
    home = tmp_path_factory.mktemp("home")
    elsewhere = home / "elsewhere"
    elsewhere.write_text(token)
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(token)
    nobody = tmp_path_factory.mktemp("nobody")
    with tempfile.TemporaryDirectory(prefix="rlhf-") as short:
        closed = head(Path(short) / "a", "127.0.0.2", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
        opened = head(Path(short) / "b", "127.0.0.3", RAY_AUTH_MODE="disabled")
        with closed as with_token, opened as without:
            wait(with_token)
            wait(without)
            none, home_token = {"HOME": str(nobody)}, {"HOME": str(home)}
            in_path = none | {"RAY_AUTH_TOKEN_PATH": str(elsewhere), "RAY_AUTH_MODE": "disabled"}
            in_variable = none | {"RAY_AUTH_TOKEN": token}
            cases = [
                (with_token, in_path, ["joined 1"]),
                (with_token, in_variable, ["joined 1"]),
                (with_token, home_token, ["joined 1"]),
                (without, in_variable | {"RAY_AUTH_MODE": "token"}, OPEN),
                (without, home_token, OPEN),
                (without, none, OPEN),
            ]
            asked = [(with_token, none), (with_token, none | {"RAY_AUTH_TOKEN": "w" * 64})]
            found = run(JOIN, json.dumps([(address, variables) for address, variables, _ in cases] + asked))
    assert found[: len(cases)] == [said for *_, said in cases]
    for (refused,), why in zip(found[len(cases) :], ("it wants a token, and there is none here", ""), strict=True):
        assert refused.startswith("refused ray.address: cannot join a Ray cluster at 127.0.0.2:")
        assert why in refused


def test_where_no_ray_answers_is_said_at_once():
    from actors.authentication import asks_token
    from rlhf.errors import ResourceError

    (port,) = free_ports(1)
    with pytest.raises(ResourceError, match="no Ray answers"):
        asks_token(f"127.0.0.1:{port}")


def test_variables_are_put_back(monkeypatch):
    from actors.authentication import MODE, TOKEN, TOKEN_PATH, RayVariables, fresh_token

    monkeypatch.setenv(MODE, "disabled")
    monkeypatch.setenv(TOKEN_PATH, "/nowhere")
    monkeypatch.delenv(TOKEN, raising=False)
    before = dict(os.environ)
    variables = RayVariables()
    variables.set(fresh_token())
    first = os.environ[TOKEN]
    assert os.environ[MODE] == "token"
    assert TOKEN_PATH not in os.environ
    variables.set(fresh_token())
    assert os.environ[TOKEN] != first
    variables.restore()
    assert dict(os.environ) == before
