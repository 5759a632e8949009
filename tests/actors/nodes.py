"""A Ray cluster of several nodes on this machine, started as a person starts one, and a run for it.

Each node has a loopback address of its own.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 120.0
END_LIMIT_S = 40.0
ROLE = re.compile(r"ray::\w+Actor(\.|$)")


def free_ports(count: int) -> list[int]:
    """Return ports on which nothing listens now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def environment(**more: str) -> dict[str, str]:
    """Return what a person's shell has: the environment with its commands on the PATH, and no Ray of the tests'."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "OMP_WAIT_POLICY": "PASSIVE", "RAY_worker_niceness": "0", **more}


def until(true: Callable[[], object], limit_s: float, what: str) -> None:
    """Wait until something is true."""
    ends = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < ends, f"{what}: not within {limit_s:.0f} s"
        time.sleep(0.3)


def two_stages(roles: str) -> str:
    """Return a recipe: SFT of the tiny model, then PPO that takes longer than any test; `roles` is YAML."""
    return f"""\
name: two
model: {{path: "tiny://llama", dtype: float32}}
tuning: {{kind: full}}
roles: {roles}
stages:
  - name: sft
    kind: sft
    data: {{path: {ROOT}/recipes/data/smoke_sft.jsonl}}
  - name: ppo
    kind: ppo
    policy: sft
    reward: {{kind: function, path: "{ROOT}/recipes/rewards/smoke.py:gold"}}
    prompts: {{path: {ROOT}/recipes/data/smoke_prompts.jsonl}}
    steps: 5000
    prompts_per_step: 8
    minibatch_size: 8
    max_prompt_tokens: 64
    max_response_tokens: 12
"""


def holders(token: str, said: str = "") -> list[psutil.Process]:
    """Return all processes that have a cluster's token in their environment: everything that it started.

    With `said` only those whose command line holds it.
    """
    found = []
    for process in psutil.process_iter():
        try:
            living = process.environ().get("RAY_AUTH_TOKEN") == token and process.status() != psutil.STATUS_ZOMBIE
            if living and said in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@dataclass
class Nodes:
    """A head and workers; processes are told apart by the cluster's token."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="rlhf-")))  # Ray's sockets: short
    token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    ports: list[int] = field(default_factory=lambda: free_ports(3))
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        return f"127.0.0.2:{self.ports[0]}"

    @property
    def jobs(self) -> str:
        return f"http://127.0.0.2:{self.ports[1]}"

    @property
    def environment(self) -> dict[str, str]:
        return environment(RAY_AUTH_TOKEN=self.token, PORT=str(self.ports[0]), JOB_PORT=str(self.ports[1]))

    def start(self, ip: str, cpus: int, **more: str) -> None:
        """Start the head, or a node that joins it; each has a temporary folder of its own, as machines have."""
        script = ["cluster/start.sh", ip, f"--ray-client-server-port={self.ports[2]}"]
        if self.nodes:
            script = ["cluster/join.sh", self.address, f"--node-ip-address={ip}"]
        with (self.folder / f"{ip}.log").open("w") as log:
            self.nodes[ip] = subprocess.Popen(
                [*script, f"--temp-dir={self.folder}/{ip}", f"--num-cpus={cpus}"],
                cwd=ROOT,
                env=self.environment | more,
                stdout=log,
                stderr=log,
            )

    def joined(self) -> int:
        """Return how many nodes the head knows."""
        for ip, node in self.nodes.items():
            assert node.poll() is None, f"{ip}: " + (self.folder / f"{ip}.log").read_text()[-2000:]
        asked = subprocess.run(
            ["ray", "status", "--address", self.address],
            env=self.environment | {"RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
        )
        return asked.stdout.count(" node_")

    def roles(self) -> dict[int, str]:
        """Return the role processes, each with the address of its node."""
        found = {}
        for process in holders(self.token):
            try:
                if ROLE.match(process.cmdline()[0]):
                    node = re.search(r"--node_ip_address=(\S+)", " ".join(process.parent().cmdline()))
                    found[process.pid] = node[1] if node else ""
            except (psutil.NoSuchProcess, IndexError, AttributeError):
                continue
        return found

    def end(self) -> list[str]:
        """End the nodes, workers first, and return what still runs of all that the cluster started."""
        for node in reversed(self.nodes.values()):
            node.send_signal(signal.SIGTERM)
        for node in self.nodes.values():
            node.wait(timeout=END_LIMIT_S)
        ends = time.monotonic() + END_LIMIT_S
        while (left := holders(self.token)) and time.monotonic() < ends:
            time.sleep(0.3)
        lines = [" ".join(process.cmdline())[:100] for process in left]
        for process in left:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        return lines
