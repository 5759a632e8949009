"""Which processes a run has, and which of them stand on the same devices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.recipe.resources import process_count, processes
from rlhf.recipe.role_schema import RoleName
from rlhf.recipe.schema import Recipe

STEPS = 10_000
"""Ray counts resources in ten-thousandths."""


@dataclass(frozen=True)
class Process:
    """One process of a role, which takes `cpus` and `gpus` of its bundle."""

    role: RoleName
    index: int
    cpus: float
    gpus: float

    @property
    def name(self) -> str:
        """The role, and for one of several its number: `policy-3`."""
        return f"{self.role}-{self.index}"


@dataclass(frozen=True)
class Bundle:
    """Resources of one machine that are reserved together; its processes see the same devices."""

    cpus: float
    gpus: float
    processes: tuple[Process, ...]

    @property
    def resources(self) -> dict[str, float]:
        """What Ray is to reserve."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


def place(recipe: Recipe) -> tuple[Bundle, ...]:
    """Return the bundles of the whole run: one for each process that does not share, in the order of the roles.

    Process i of a role that shares stands in bundle i of its host; a rollout replica with tensor parallelism spans as
    many of the host's bundles, and is entered in the first of them. All processes of a bundle get equal parts of its
    GPUs, so that Ray puts them on the same one.
    """
    used = processes(recipe)
    hosts = [name for name in used if used[name].shares is None]
    hosts += [want.shares for want in used.values() if want.shares and want.shares not in hosts]
    bundles = []
    for host in hosts:
        role = getattr(recipe.roles, host)
        guests = [(name, want, _stride(recipe, name)) for name, want in used.items() if want.shares == host]
        for index in range(process_count(recipe, host)):
            members: list[tuple[RoleName, int, float]] = [(host, index, role.cpus)] if host in used else []
            members += [
                (name, index // stride, want.cpus)
                for name, want, stride in guests
                if index % stride == 0 and index // stride < want.count
            ]
            part = role.gpus if len(members) < 2 else math.floor(role.gpus / len(members) * STEPS) / STEPS
            placed = tuple(Process(name, number, cpus, part) for name, number, cpus in members)
            bundles.append(Bundle(sum(process.cpus for process in placed), role.gpus, placed))
    return tuple(bundles)


def _stride(recipe: Recipe, name: RoleName) -> int:
    """Return how many bundles of its host one process of a sharing role spans."""
    return recipe.roles.rollout.tensor_parallel if name == "rollout" else 1
