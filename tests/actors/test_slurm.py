"""The Slurm script with stand-ins for Slurm's commands: two "nodes" on this machine, a run, an early end, a requeue."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from nodes import ROOT, environment, two_stages, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

SRUN = """\
#!/usr/bin/env bash
# Runs the command here as the node that the options choose.
while [[ $1 == --* ]]; do shift; done
[[ $1 == */join.sh ]] && exec "$@" --node-ip-address=127.0.0.6 --temp-dir="$SCRATCH/b"
[[ $1 == */start.sh ]] && exec "$@" --ray-client-server-port=$((PORT + 5000))
exec "$@"
"""
SCONTROL = """\
#!/usr/bin/env bash
if [[ $1 == show ]]; then printf '%s\\n' node-1 node-2; else echo "$@" >>"$SCRATCH/asked"; fi
"""


class Batch:
    """The script as Slurm would run it."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.number = str(100_000 + secrets.randbelow(5_000))
        self.printed = folder / f"{self.number}.out"
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (scratch / name).write_text(text)
            (scratch / name).chmod(0o755)
        variables = environment(
            SLURM_JOB_ID=self.number, SLURM_JOB_NODELIST="node-[1-2]", SLURM_SUBMIT_DIR=str(folder),
            SLURM_CPUS_PER_TASK="2", SLURM_GPUS_ON_NODE="0", RLHF_ROOT=str(ROOT), RLHF_REQUEUE="1",
            HEAD_ADDRESS="127.0.0.5", SCRATCH=str(scratch),
        )  # fmt: skip
        variables["PATH"] = f"{scratch}{os.pathsep}{variables['PATH']}"
        self.variables = variables
        self.folder = folder

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        script = ["bash", ROOT / "cluster" / "slurm.sbatch", "batch.yaml", *options]
        with self.printed.open("a") as out:
            return subprocess.Popen(script, cwd=self.folder, env=self.variables, stdout=out, stderr=out)

    def alive(self) -> list[str]:
        """Return what of the job still runs."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("SLURM_JOB_ID") == self.number
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline())[:100])
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found


def test_a_batch_job_ends_cleanly_when_told_to_and_goes_on_when_requeued(tmp_path, tmp_path_factory):
    folder, scratch = tmp_path, Path(tmp_path_factory.mktemp("s"))
    (folder / "batch.yaml").write_text(two_stages("{rollout: {engine: transformers}}"))
    batch = Batch(folder, scratch)
    steps = ("--set", "stages.ppo.steps=60")
    job = batch.start(*steps)
    step = folder / "runs" / "two" / "stages" / "ppo" / "metrics.jsonl"
    until(lambda: (step.exists() and step.read_text()) or job.poll() is not None, 300, "a step of ppo")
    assert job.poll() is None, batch.printed.read_text()
    tokens = {
        process.environ().get("RAY_AUTH_TOKEN") for process in psutil.Process(job.pid).children(recursive=True)
    } - {None}
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 143, batch.printed.read_text()
    until(lambda: not batch.alive(), 40, "the end of every process")
    assert (scratch / "asked").read_text() == f"requeue {batch.number}\n"

    job = batch.start(*steps)
    assert job.wait(timeout=300) == 0, batch.printed.read_text()
    until(lambda: not batch.alive(), 40, "the end of every process")
    printed = batch.printed.read_text()
    assert "Ray: 2 nodes, head on node-1" in printed
    assert "[1/2] sft: unchanged, reused" in printed
    assert "ppo goes on after step" in printed
    assert "[2/2] ppo: done" in printed
    assert len(tokens) == 1
    (token,) = tokens
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    assert not Path(f"/tmp/ray-{batch.number}").exists()
    logs = [path.read_text() for path in (folder / f"slurm-{batch.number}").iterdir()]
    assert len(logs) == 2
    assert not any(token in text for text in [printed, *logs])
