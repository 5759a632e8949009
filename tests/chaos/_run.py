"""A run that faults are injected into: its recipe, its reward server, its processes and its progress."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.row import environment, pinned

RECIPES = Path(__file__).parents[2] / "recipes"
MARK = "RLHF_CHAOS_RUN"
STEPS = {"ppo": 60, "dpo": 32}
MEASURED = re.compile("time|seconds_.*|tokens_per_second")
RECIPE = """\
name: faults
model: {{path: "tiny://llama", dtype: float32}}
tuning: {{kind: lora, r: 4}}
ray: {{call_timeout_s: 30}}
recovery: {{every_steps: 1, restarts: 1000}}
roles: {{reference: {{}}, rollout: {{engine: transformers}}}}
stages:
  - name: ppo
    kind: ppo
    policy: base
    reward: {{kind: http, url: "http://127.0.0.1:{port}/score", timeout_s: 1, deadline_s: 60}}
    prompts: {{path: {recipes}/data/smoke_prompts.jsonl}}
    steps: {ppo}
    samples: {{keep: null}}
    prompts_per_step: 4
    samples_per_prompt: 2
    minibatch_size: 4
    max_prompt_tokens: 64
    max_response_tokens: 8
    optimizer: {{learning_rate: 2e-3}}
  - {{name: dpo, kind: dpo, policy: base, data: {{path: {recipes}/data/smoke_pairs.jsonl}}, batch_size: 1, epochs: 2,
     heldout_fraction: 0}}
"""


class Server:
    """A reward service on loopback; `faults` are what the next requests meet instead of scores."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.met = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                items = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["items"]
                fault = server.faults.pop() if server.faults else ""
                server.met += bool(fault)
                if fault == "timeout":
                    time.sleep(1.3)
                if fault in ("reset", "timeout"):
                    self.connection.close()
                    return
                body = json.dumps({"scores": [item["response"].count("e") / 8 for item in items]}).encode()
                self.send_response({"500": 500, "429": 429}.get(fault, 200))
                self.send_header("Content-Length", str(len(body)))
                if fault == "429":
                    self.send_header("Retry-After", "0.1")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self.http.server_address[1]


class Run:
    """`rlhf run` in a process of its own, started again and again in one folder."""

    def __init__(self, folder: Path, server: Server, local: bool) -> None:
        self.folder = folder
        self.local = local
        self.starts = 0
        folder.mkdir(parents=True)
        self.recipe = folder.with_suffix(".yaml")
        self.recipe.write_text(RECIPE.format(port=server.port, recipes=RECIPES, ppo=STEPS["ppo"]))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.starts += 1
        command = [sys.executable, "-m", "rlhf.cli", "run", str(self.recipe), "--output", str(self.folder)]
        with self.folder.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                command + ["--local"] * self.local,
                env=environment(**{MARK: self.folder.name}),
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=pinned(0) if self.local else None,
            )

    def ended(self) -> int | None:
        return self.process.poll() if self.process else None

    def wait(self, seconds: float) -> int | None:
        """Return the exit code, or None after so many seconds, when the process is ended."""
        assert self.process is not None
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            return None

    def last_words(self) -> str:
        """Return the last line that the run has printed."""
        lines = self.folder.with_suffix(".log").read_text(errors="replace").splitlines()
        return lines[-1] if lines else "nothing"

    def progress(self) -> int:
        """Return how many rows of metrics there are."""
        return sum(file.read_bytes().count(b"\n") for file in self.folder.glob("stages/*/metrics.jsonl"))

    def processes(self, role: str) -> list[psutil.Process]:
        """Return the living processes of a role, or all of the run for an empty one."""
        found = []
        for process in psutil.process_iter(["status"]):
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            mine = environment.get(MARK) == self.folder.name and process.info["status"] != psutil.STATUS_ZOMBIE
            if mine and environment.get("RLHF_PROCESS", "").startswith(role):
                found.append(process)
        return found

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """Return a stage's rows, without what is measured by the clock."""
        lines = (self.folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()
        return [
            {name: value for name, value in json.loads(line).items() if not MEASURED.fullmatch(name)} for line in lines
        ]

    def sealed(self, stage: str) -> dict[str, Any]:
        """Return the digests of a finished stage's model."""
        return json.loads((self.folder / "stages" / stage / "done.json").read_text())["files"]

    def prompts(self) -> list[list[str]]:
        """Return the prompts of each PPO step, in their order."""
        files = sorted((self.folder / "stages" / "ppo" / "samples").glob("step-*.jsonl"))
        return [[json.loads(line)["prompt_id"] for line in file.read_text().splitlines()] for file in files]
