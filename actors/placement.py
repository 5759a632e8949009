"""Reserving a run's bundles on the cluster: refused when impossible, waited for visibly and not for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rlhf.errors import ResourceError
from rlhf.recipe.placement import Bundle

POLL_S = 5.0
Amounts = Mapping[str, float]


def reserve(bundles: Sequence[Bundle], timeout_s: float, say: Callable[[str], None]) -> PlacementGroup:
    """Reserve all bundles together, in that order; ResourceError says what is needed and what there is.

    Bundles are packed on as few machines as they fit; the resources of one bundle are always of one machine.
    """
    for bundle in bundles:
        if not any(bundle.resources.values()):
            raise ResourceError(
                f"the process {_names(bundle)} asks for no CPU and no GPU; give its role some, say cpus: 0.1"
            )
    check_possible(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    group = placement_group([bundle.resources for bundle in bundles], strategy="PACK")
    try:
        wait_for_room(group, bundles, timeout_s, say)
    except ResourceError:
        remove_placement_group(group)
        raise
    return group


def wait_for_room(
    group: PlacementGroup, bundles: Sequence[Bundle], timeout_s: float, say: Callable[[str], None]
) -> None:
    """Wait until the group has all its bundles, also again after it has lost a machine; ResourceError in the end."""
    needed = _total([bundle.resources for bundle in bundles])
    start = time.monotonic()
    waited = 0.0
    while not _has_room(group, min(POLL_S, timeout_s - waited)):
        free = _show(_only(ray.available_resources(), needed))
        waited = time.monotonic() - start
        if waited >= timeout_s:
            raise ResourceError(
                f"no room for the roles after {waited:.0f} s: needed {_show(needed)}, free {free};"
                " end what holds them, or raise ray.placement_timeout_s"
            )
        say(f"waiting for the cluster: needed {_show(needed)}, free {free} ({waited:.0f} s of {timeout_s:.0f} s)")


def _has_room(group: PlacementGroup, wait_s: float) -> bool:
    try:
        return group.wait(_whole_seconds(wait_s))
    except Exception as error:  # Ray's own, of no other kind
        if "does not exist" not in str(error):
            raise
        raise ResourceError(
            "Ray has dropped what was reserved for this run, as it does when it loses the machine that the run was"
            " started on; the same command goes on from the last saved state"
        ) from error


def check_possible(bundles: Sequence[Bundle], nodes: Sequence[Amounts]) -> None:
    """Raise ResourceError for bundles that machines with these resources can never hold, however empty they are.

    What is refused is impossible: too little in all, or machines too small for a bundle, or for so many large ones.
    """
    wanted = [bundle.resources for bundle in bundles]
    needed, there = _total(wanted), _total(nodes)
    if any(amount > there.get(name, 0) for name, amount in needed.items()):
        raise ResourceError(f"the recipe needs {_show(needed)}, the cluster has {_show(_only(there, needed))}")
    for bundle in bundles:
        room = sum(_fitting(bundle.resources, node) for node in nodes)
        as_large = [other for other in wanted if all(other.get(n, 0) >= a for n, a in bundle.resources.items())]
        if room < len(as_large):
            largest = ", ".join(sorted({_show(_only(node, needed)) for node in nodes}))
            raise ResourceError(
                f"{len(as_large)} times {_show(bundle.resources)} on one machine (for {_names(bundle)}) are needed, but"
                f" the cluster's machines have {largest}: room for {room}"
            )


def _fitting(bundle: Amounts, node: Amounts) -> int:
    """Return how often a bundle fits into an empty node."""
    return min(int(node.get(name, 0) / amount + 1e-6) for name, amount in bundle.items() if amount)


def _names(bundle: Bundle) -> str:
    return ", ".join(process.name for process in bundle.processes)


def _whole_seconds(wait_s: float) -> int:
    """Round up: `PlacementGroup.wait` cuts fractions off, and does not wait at all below one second."""
    return max(1, math.ceil(wait_s))


def _total(bundles: Sequence[Amounts]) -> dict[str, float]:
    names = {name for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in sorted(names)}


def _only(resources: Amounts, wanted: Amounts) -> dict[str, float]:
    return {name: resources.get(name, 0) for name in wanted}


def _show(resources: Amounts) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
