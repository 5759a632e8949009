"""The smoke recipes through Ray, run as a user runs them: same numbers as in one process, and nothing left behind.

Each run is a process of its own, since it starts and ends its own Ray. Role processes are told apart by the titles that
Ray gives them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import environment
from safetensors.torch import load_file

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SMOKE = Path(__file__).parents[2] / "recipes" / "smoke"
RUN_LIMIT_S = 800.0
END_LIMIT_S = 30.0
LOOK_EVERY_S = 1.0
TRAINED = ("sft", "rm", "ppo", "dpo")
STAGES = ("sft", "pairs", "rm", "ppo", "dpo", "duel")
PRINTED = ("printed.out", "printed.err")
CLOCKED = re.compile(r"time|seconds_\w+|tokens_per_second")

STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", timeout=20)
    print("admitted")
except Exception as error:
    print("refused", error)
"""


@dataclass
class Watched:
    """What was seen of a run and of all processes below it while it ran."""

    folder: Path
    run: subprocess.Popen[bytes]
    titles: dict[psutil.Process, set[str]] = field(default_factory=dict)
    listening: set[str] = field(default_factory=set)
    address: str = ""
    token: str = field(default="", repr=False)
    sessions: set[str] = field(default_factory=set)

    @property
    def stdout(self) -> str:
        return (self.folder / PRINTED[0]).read_text()

    @property
    def stderr(self) -> str:
        return (self.folder / PRINTED[1]).read_text()

    def look(self) -> None:
        """Note all processes below the run: titles, listening addresses, Ray's address, token and folder."""
        for process in psutil.Process(self.run.pid).children(recursive=True):
            try:
                command = process.cmdline()
                self.titles.setdefault(process, set()).add(command[0] if command else "")
                self.listening |= {c.laddr.ip for c in process.net_connections("inet") if c.status == "LISTEN"}
                self.sessions |= set(re.findall(r"--session[-_]dir=(\S+)", " ".join(command)))
                if named := re.search(r"--gcs-address=(\S+)", " ".join(command)):
                    self.address, self.token = named[1], process.environ().get("RAY_AUTH_TOKEN", "")
            except psutil.NoSuchProcess:
                continue

    def pids(self, title: str) -> set[int]:
        """Return the processes that were seen under a title, with or without their name and the method that they ran.

        While an actor is built, which is mostly the import of libraries, its title begins with its name.
        """
        names = re.compile(rf"ray::(\S+:)?{title}(\.\w+)?")
        return {process.pid for process, titles in self.titles.items() if any(map(names.fullmatch, titles))}

    def left(self) -> set[str]:
        """Return what still runs of all processes seen; zombies have ended."""
        alive = {process for process in self.titles if process.is_running()}
        return {str(self.titles[p]) for p in alive if p.status() != psutil.STATUS_ZOMBIE}

    def finish(self) -> None:
        """Look until the run ends, and then until its processes are gone."""
        ends = time.monotonic() + RUN_LIMIT_S
        while self.run.poll() is None and time.monotonic() < ends:
            self.look()
            time.sleep(LOOK_EVERY_S)
        self.run.kill()
        self.run.wait(timeout=60)
        ends = time.monotonic() + END_LIMIT_S
        while self.left() and time.monotonic() < ends:
            time.sleep(0.2)


def start(folder: Path, recipe: str, *arguments: str, core: int | None = None) -> Watched:
    """Start a run; on one core every role computes with one thread, whichever launcher builds it."""
    command = [sys.executable, "-m", "rlhf.cli", "run", str(SMOKE / recipe), "--output", str(folder), *arguments]
    pinned = ["taskset", "--cpu-list", str(core)] if core is not None else []
    out, err = (folder / name for name in PRINTED)
    with out.open("w") as stdout, err.open("w") as stderr:
        return Watched(folder, subprocess.Popen([*pinned, *command], stdout=stdout, stderr=stderr, env=environment()))


def ask(address: str, **variables: str) -> str:
    """Return what becomes of a request to Ray from a process outside the run."""
    command = [sys.executable, "-c", STRANGER, address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(**variables)).stdout


def rows(folder: Path, stage: str) -> list[dict]:
    """Return a stage's metrics without what clocks said."""
    file = folder / "stages" / stage / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{name: value for name, value in line.items() if not CLOCKED.fullmatch(name)} for line in lines]


def summary(folder: Path, stage: str) -> Mapping:
    return json.loads((folder / "stages" / stage / "done.json").read_text())["summary"]


@dataclass(frozen=True)
class Pair:
    ray: Watched
    local: Path
    without_token: str
    with_token: str


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Pair:
    """The smoke pipeline through Ray and in one process, side by side; Ray is asked from outside on the way."""
    cores = sorted(os.sched_getaffinity(0))
    local = start(tmp_path_factory.mktemp("local"), "pipeline.yaml", "--local", core=cores[0])
    through_ray = start(tmp_path_factory.mktemp("ray"), "pipeline.yaml", core=cores[-1])
    ends = time.monotonic() + RUN_LIMIT_S
    while not through_ray.pids("LearnerActor") and through_ray.run.poll() is None and time.monotonic() < ends:
        through_ray.look()
        time.sleep(LOOK_EVERY_S)
    answers = (
        ask(through_ray.address),
        ask(through_ray.address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=through_ray.token),
    )
    through_ray.finish()
    local.finish()
    assert through_ray.run.returncode == 0, through_ray.stderr
    assert local.run.returncode == 0, local.stderr
    return Pair(through_ray, local.folder, *answers)


def timeless(report: Path) -> Any:
    """Return a report without the seconds that training took."""
    return json.loads(
        report.read_text(),
        object_hook=lambda item: {name: value for name, value in item.items() if not name.endswith("seconds")},
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_metric_is_the_same(both, stage):
    assert rows(both.ray.folder, stage) == rows(both.local, stage)
    assert len(rows(both.ray.folder, stage)) == {"sft": 7, "pairs": 1, "rm": 13, "ppo": 6, "dpo": 5, "duel": 0}[stage]


@pytest.mark.parametrize("stage", TRAINED)
def test_saved_weights_are_bitwise_the_same(both, stage):
    through_ray, local = (
        load_file(folder / "stages" / stage / "model" / "model.safetensors") for folder in (both.ray.folder, both.local)
    )
    assert through_ray.keys() == local.keys()
    for name in local:
        assert through_ray[name].numpy().tobytes() == local[name].numpy().tobytes(), name


def test_pairs_samples_and_the_report_are_the_same(both):
    made = sorted(
        path.relative_to(both.local)
        for pattern in ("stages/pairs/pairs.jsonl", "stages/*/samples/**/*.jsonl")
        for path in both.local.glob(pattern)
    )
    assert len(made) == 1 + 6 + 3 * 2  # of each candidate its responses and its scores of the retention chats
    for path in made:
        assert (both.ray.folder / path).read_bytes() == (both.local / path).read_bytes(), path
    assert timeless(both.ray.folder / "report.json") == timeless(both.local / "report.json")


def test_summaries_are_the_same(both):
    for stage in STAGES:
        assert summary(both.ray.folder, stage) == summary(both.local, stage)


def test_every_role_is_a_process_of_its_own(both):
    """Policy, reward model and critic; the reference is the policy with its adapters off."""
    assert len(both.ray.pids("LearnerActor")) == 3
    assert len(both.ray.pids("RolloutActor")) == 1
    assert both.ray.run.pid not in both.ray.pids("LearnerActor") | both.ray.pids("RolloutActor")


def test_ray_asks_for_the_runs_token(both):
    assert re.fullmatch(r"[0-9a-f]{64}", both.ray.token)
    assert both.without_token.startswith("refused")
    assert "InvalidAuthToken" in both.without_token
    assert both.with_token.strip() == "admitted"


def test_ray_listens_on_loopback_alone(both):
    assert both.ray.listening
    assert {ip for ip in both.ray.listening if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")} == set()


def test_nothing_runs_on_after_the_end(both):
    assert len(both.ray.titles) > 6
    assert both.ray.left() == set()


def test_nothing_stays_in_the_temporary_folder(both):
    (session,) = both.ray.sessions
    assert Path(session).parent.name.startswith("rlhf-ray-")
    assert not Path(session).parent.exists()


def test_a_run_that_a_guard_stops_ends_all_the_same(tmp_path):
    run = start(tmp_path, "ppo_function.yaml", "--set", "stages.ppo.agreement.tolerance=1e-12")
    run.finish()
    assert run.run.returncode == 6, run.stderr
    assert re.match(r"error: stage ppo: engine and trainer logprobs differ by \S+ nats in the mean", run.stderr)
    assert len(run.stderr.splitlines()) <= 6
    assert "Traceback" not in run.stdout + run.stderr
    started = re.findall(r"INFO rlhf: starting (\S+)", (tmp_path / "logs" / "run.log").read_text())
    assert started == ["policy-0", "reference-0", "critic-0", "rollout-0"]  # too short a run to see all their titles
    assert run.pids("LearnerActor")
    assert run.left() == set()
    assert [Path(session).parent.exists() for session in run.sessions] == [False]
    assert not (tmp_path / "stages" / "ppo" / "done.json").exists()


@pytest.mark.vllm
def test_the_pipeline_with_vllm_agrees_with_the_trainer_at_every_step(tmp_path):
    run = start(tmp_path, "vllm.yaml", "--set", "stages.ppo.old_logprobs=recompute")
    run.finish()
    assert run.run.returncode == 0, run.stderr
    steps = rows(tmp_path, "ppo")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert max(row.get("agreement", 0) for row in steps) < 1e-4
    assert max(row.get("agreement_max", 0) for row in steps) < 1e-3
    assert steps[-1]["kl"] > 1e-3
    published = summary(tmp_path, "ppo")
    assert published["weight_version"] == len(steps)
    model = load_file(tmp_path / "stages" / "ppo" / "model" / "model.safetensors")
    assert published["publish_bytes"] == sum(tensor.nbytes for tensor in model.values())
    assert (tmp_path / "report.html").exists()
    assert run.left() == set()
