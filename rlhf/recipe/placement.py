"""Which processes a run has, and which of them stand on the same devices."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.recipe.resources import Wanted, process_count, processes
from rlhf.recipe.role_schema import RoleName
from rlhf.recipe.schema import Recipe


@dataclass(frozen=True)
class Process:
    """One process of a role, which takes `cpus` and `gpus`.

    `guest_of` are the numbers of the host's processes whose devices it uses; it then takes no GPU of its own.
    """

    role: RoleName
    index: int
    cpus: float
    gpus: float
    guest_of: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The role and its number: `policy-3`."""
        return f"{self.role}-{self.index}"


@dataclass(frozen=True)
class Bundle:
    """Processes whose resources are reserved together, on one machine: some of a host's, and their guests."""

    processes: tuple[Process, ...]

    @property
    def resources(self) -> dict[str, float]:
        """What Ray is to reserve."""
        cpus, gpus = (sum(getattr(process, unit) for process in self.processes) for unit in ("cpus", "gpus"))
        return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})

    def devices(self) -> list[tuple[Process, ...]]:
        """Return, for each process of the host, all that stand on its devices, itself first."""
        hosts = [process for process in self.processes if not process.guest_of]
        return [(host, *(guest for guest in self.processes if host.index in guest.guest_of)) for host in hosts]


def place(recipe: Recipe) -> tuple[Bundle, ...]:
    """Return the bundles of the whole run, in the order of the roles.

    A bundle is one process, of a role that does not share, with process i of each role that shares its devices. A
    rollout replica with tensor parallelism spans as many of the policy's processes, which then share a bundle. The
    host of a role that shares is there even where no stage uses it, to hold the devices.
    """
    used = processes(recipe)
    hosts = [name for name, want in used.items() if want.shares is None]
    hosts += [want.shares for want in used.values() if want.shares and want.shares not in used]
    return tuple(bundle for host in dict.fromkeys(hosts) for bundle in _bundles(recipe, host, used))


def _bundles(recipe: Recipe, host: RoleName, used: dict[RoleName, Wanted]) -> list[Bundle]:
    role = getattr(recipe.roles, host)
    guests = {name: want for name, want in used.items() if want.shares == host}
    width = recipe.roles.rollout.tensor_parallel if "rollout" in guests else 1
    bundles = []
    for first in range(0, process_count(recipe, host), width):
        members = [Process(host, first + number, role.cpus, role.gpus) for number in range(width)]
        for name, want in guests.items():
            spans = width if name == "rollout" else 1
            members += [
                Process(name, number, want.cpus, 0, tuple(range(number * spans, (number + 1) * spans)))
                for number in range(first // spans, (first + width) // spans)
                if number < want.count
            ]
        bundles.append(Bundle(tuple(members)))
    return bundles
