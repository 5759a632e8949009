"""A cluster of three nodes on this machine: roles spread over them, jobs handed to it, and the loss of a node."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes import ROOT, Nodes, environment, holders, two_stages, until

from rlhf.recipe.base import DTYPES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SMOKE = ROOT / "recipes" / "smoke"
RUN_LIMIT_S = 240.0
HEAD, MIDDLE, LAST = "127.0.0.2", "127.0.0.3", "127.0.0.4"
ROWS = "".join((ROOT / "recipes/data/smoke_sft.jsonl").read_text().splitlines(keepends=True)[:8])
ROLES = "{policy: {cpus: 2}, rollout: {engine: transformers, cpus: 2}}"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        for count, ip in enumerate((HEAD, MIDDLE, LAST), start=1):  # Ray gives each 30 s to come up
            nodes.start(ip, 2, RLHF_RUNS=str(nodes.folder / "runs"))
            until(lambda count=count: nodes.joined() == count, 120, f"{count} nodes")
        yield nodes
    finally:
        left = nodes.end()
    assert left == []


def rlhf(*arguments: str | Path, token: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(RAY_AUTH_TOKEN=token),
    )


def finish(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = run.communicate(timeout=RUN_LIMIT_S)
    finally:
        run.kill()
    return run.returncode, out, err


def sft_recipe(folder: Path, rows: str, epochs: int = 1) -> Path:
    """Write a recipe that extends a base, with a file beside it."""
    (folder / "rows.jsonl").write_text(rows)
    (folder / "base.yaml").write_text('name: base\nmodel: {path: "tiny://llama"}\nstages: []\n')
    recipe = folder / "handed.yaml"
    recipe.write_text(
        "extends: base.yaml\nname: handed\nstages:\n  - name: sft\n    kind: sft\n    data: {path: rows.jsonl}\n"
        f"    batch_size: 4\n    epochs: {epochs}\n"
    )
    return recipe


def test_a_job_brings_its_files_and_gives_back_its_exit_code(cluster, tmp_path):
    recipe = sft_recipe(tmp_path, ROWS)
    code, out, err = finish(rlhf("submit", recipe, "--address", cluster.jobs, token=cluster.token))
    assert code == 0, out + err
    assert "uploading 3 files" in out
    assert "[1/1] sft: done in" in out
    done = cluster.folder / "runs" / "handed" / "stages" / "sft" / "done.json"
    made = json.loads(done.read_text())
    assert made["cost"]
    assert made["content"]["dtype"] in DTYPES  # as its machines have decided
    assert cluster.token not in out + err
    assert cluster.roles() == {}

    recipe = sft_recipe(tmp_path, ROWS + '{"messages": 3}\n')
    submitted = ("--name", "bad", "--output", str(tmp_path / "bad"))
    code, out, err = finish(rlhf("submit", recipe, "--address", cluster.jobs, *submitted, token=cluster.token))
    assert code == 3, out + err
    assert re.search(r"error: .*rows\.jsonl:9: ", out)


def test_ctrl_c_ends_the_job(cluster, tmp_path):
    recipe = sft_recipe(tmp_path, ROWS, epochs=100_000)
    where = ("--name", "long", "--output", str(tmp_path / "run"))
    run = rlhf("submit", recipe, "--address", cluster.jobs, *where, token=cluster.token)
    until(lambda: cluster.roles() or run.poll() is not None, 120, "roles")
    run.send_signal(signal.SIGINT)
    code, out, err = finish(run)
    assert code == 130, out + err
    assert re.search(r"stopping long-\w{8}", err)
    until(lambda: cluster.roles() == {}, 120, "the end of all roles")


def test_a_job_without_the_token_is_refused(cluster):
    recipe = SMOKE / "ppo_function.yaml"
    code, out, err = finish(rlhf("submit", recipe, "--address", cluster.jobs, token="0" * 64))
    assert (code, out) == (4, "")
    assert re.fullmatch(r"error: \S+ wants a token that this is not: set RAY_AUTH_TOKEN to the cluster's\n", err)


def test_roles_spread_over_nodes_and_what_a_lost_node_held_finds_no_room_but_nothing_is_lost(cluster, tmp_path):
    """It takes a node away, which no other test needs."""
    recipe = tmp_path / "two.yaml"
    recipe.write_text(two_stages(ROLES))
    common = ("run", recipe, "--output", tmp_path / "run", f"--set=ray.address={cluster.address}")
    common += ("--set=ray.placement_timeout_s=6",)
    run = rlhf(*common, token=cluster.token)
    metrics = tmp_path / "run" / "stages" / "ppo" / "metrics.jsonl"
    until(lambda: (metrics.exists() and metrics.read_text()) or run.poll() is not None, 150, "a step of ppo")
    where = cluster.roles()
    assert len(where) == 4, finish(run)
    assert set(where.values()) == {HEAD, MIDDLE, LAST}

    lost = cluster.nodes.pop(LAST)
    lost.send_signal(signal.SIGKILL)
    for process in holders(cluster.token, said=f"--node_ip_address={LAST}"):
        process.kill()
    code, out, err = finish(run)
    assert code == 4, err
    assert re.search(r"(policy|reference|critic|rollout)\S*: the process died", out), out
    assert "no room for the roles after" in err
    until(lambda: cluster.roles() == {}, 120, "the end of all roles")

    fewer = ("--set=roles.policy.cpus=1", "--set=roles.rollout.cpus=1")
    code, out, err = finish(rlhf(*common, "--set=stages.ppo.steps=1", *fewer, token=cluster.token))
    assert code == 0, err
    assert "[1/2] sft: unchanged, reused" in out
    assert cluster.roles() == {}
