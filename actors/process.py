"""An actor's process as the cluster knows it: where it is, what memory there is, and how to end it for certain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import ray
from ray._private import state, worker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.head import head_answers

if TYPE_CHECKING:
    from ray.actor import ActorHandle

GIB = 2**30
LEAVES_S = 2.0
TITLE = "ray::"
"""Ray's processes of actors are called so; another process may have got the number of one that has ended."""


@dataclass(frozen=True)
class Place:
    """Where an actor's process is or was."""

    pid: int
    address: str
    node: str

    @staticmethod
    def of(actor_id: str) -> Place | None:
        """Ask the cluster; None before the process has started, for forgotten actors, and where no head answers."""
        known = state.actors(actor_id=actor_id) if head_answers() else None
        if not known or not known["Pid"]:
            return None
        return Place(known["Pid"], known["Address"]["IPAddress"], known["Address"]["NodeID"])

    @property
    def here(self) -> bool:
        """Whether it is on this machine."""
        return self.node == ray.get_runtime_context().get_node_id()

    def __str__(self) -> str:
        """Address, node, process and, on this machine, memory: what it holds, and what is free."""
        said = f"{self.address}, node {self.node[:8]}, pid {self.pid}"
        if not self.here:
            return said
        memory = psutil.virtual_memory()
        held = f", it held {_resident(self.pid) / GIB:.1f} GiB" if _resident(self.pid) else ""
        return f"{said}{held}, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"

    def last_words(self, lines: int = 20) -> str:
        """Return the end of what the process wrote to its standard error, where that is on this machine."""
        node = worker._global_node
        if node is None or not self.here:
            return ""
        found = sorted(Path(node.get_logs_dir_path()).glob(f"worker-*-{self.pid}.err"))
        return "\n".join(found[-1].read_text(errors="replace").splitlines()[-lines:]) if found else ""


class KernelKills:
    """Whether the kernel has ended processes of this machine for want of memory since it was asked last."""

    def __init__(self) -> None:
        self.seen = _oom_kills()

    def more(self) -> bool:
        """Return whether there were more."""
        before, self.seen = self.seen, _oom_kills()
        return self.seen > before


def end(handles: Sequence[ActorHandle], elsewhere: bool = False) -> None:
    """End the processes of actors: by Ray, and after `LEAVES_S` by SIGKILL, as Ray leaves a stopped process alone.

    A process on another machine gets the SIGKILL only where `elsewhere` asks for it, as that takes a process there.
    """
    for handle in handles:
        ray.kill(handle)
    places = [place for handle in handles if (place := Place.of(handle._actor_id.hex())) is not None]
    _kill([place.pid for place in places if place.here])
    if not elsewhere or not head_answers():
        return
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for place in places:
        if not place.here and place.node in alive:
            strategy = NodeAffinitySchedulingStrategy(place.node, soft=False)
            ray.remote(_kill).options(num_cpus=0, scheduling_strategy=strategy).remote([place.pid])


def _kill(pids: Sequence[int]) -> None:
    """Wait for actors' processes of this machine to leave, and kill those that do not, and what they started."""
    for process in psutil.wait_procs([process for pid in pids for process in _actor(pid)], LEAVES_S)[1]:
        try:
            for one in [*process.children(recursive=True), process]:
                one.kill()
        except psutil.NoSuchProcess:
            continue


def _actor(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process] if "".join(process.cmdline()[:1]).startswith(TITLE) else []
    except psutil.NoSuchProcess:
        return []


def _resident(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _oom_kills() -> int:
    for line in Path("/proc/vmstat").read_text().splitlines():
        if line.startswith("oom_kill "):
            return int(line.split()[1])
    return 0
