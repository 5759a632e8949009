"""What the devices of a cluster are fast at, asked of its machines before the roles are built."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.connect import connect
from rlhf.recipe.dtype import Here, Speed
from rlhf.recipe.products import Products, cpu_products
from rlhf.recipe.resources import processes
from rlhf.recipe.schema import Recipe
from rlhf.untrusted import printable

log = logging.getLogger("rlhf")
ANSWER_S = 120.0
KIND = "accelerator_type:"
WITHOUT_BFLOAT16 = ("P100", "V100", "T4", "P4", "K80")
"""Ray's names of NVIDIA's GPUs before Ampere."""


class ClusterDevices:
    """The devices of the cluster that a recipe joins; it is joined once for all that is asked."""

    visible = False

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @cached_property
    def gpu(self) -> Speed:
        """The GPUs, by the names that Ray has of them; one whose name it does not know counts as a newer one."""
        return gpu_speed(self._asked[0])

    @cached_property
    def cpu(self) -> Speed:
        """The slowest CPUs; this machine's where none answers."""
        return cpu_speed(self._asked[1]) or Here().cpu

    @cached_property
    def _asked(self) -> tuple[list[Mapping[str, Any]], list[Products]]:
        """Return the machines of the cluster, and the rates of those that have CPUs for roles."""
        connection = connect(self.recipe, ())
        try:
            nodes = [node for node in ray.nodes() if node["Alive"]]
            wanted = any(not role.gpus for role in processes(self.recipe).values())
            return nodes, ask_cpus(nodes) if wanted else []
        finally:
            connection.close(failed=False)


def gpu_speed(nodes: Sequence[Mapping[str, Any]]) -> Speed:
    """Return what the GPUs of nodes (`ray.nodes`) are fast at: all of them must have bfloat16."""
    kinds = {name.removeprefix(KIND) for node in nodes for name in node["Resources"] if name.startswith(KIND)}
    without = [kind for kind in WITHOUT_BFLOAT16 if kind in kinds]
    return Speed(f"the cluster's {', '.join(without) or 'GPUs'}", "float32" if without else "bfloat16")


def cpu_speed(found: Sequence[Products]) -> Speed | None:
    """Return what the slowest CPUs are fast at: float32 where that is faster on any of them; None without any."""
    if not found:
        return None
    slowest = max(found, key=lambda products: (products.faster == "float32", products.slower))
    return Speed("the cluster's CPUs", slowest.faster, slowest.slower)


def ask_cpus(nodes: Sequence[Mapping[str, Any]]) -> list[Products]:
    """Return the rates of each node that has CPUs for roles, as far as they answer in time."""
    ask = ray.remote(cpu_products)
    places = [
        NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        for node in nodes
        if node["Resources"].get("CPU", 0) > 0
    ]
    asked = [ask.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote() for place in places]
    ready, late = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
    found = []
    for answer in ready:
        try:
            found.append(ray.get(answer))
        except ray.exceptions.RayError as error:
            log.info("a machine of the cluster cannot measure its CPU: %s", printable(str(error), 500))
    for answer in late:
        ray.cancel(answer, force=True)
    return found
