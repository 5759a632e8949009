"""Reserving the recipe's resources on the cluster: refused when impossible, waited for visibly and not for ever."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rlhf.errors import ResourceError

POLL_S = 5.0


def reserve(bundles: Mapping[str, dict[str, float]], timeout_s: float, say: Callable[[str], None]) -> PlacementGroup:
    """Reserve one bundle per process (name -> resources) in that order; ResourceError says needed and available."""
    for name, bundle in bundles.items():
        if not any(bundle.values()):
            raise ResourceError(f"the process {name} asks for no CPU and no GPU; give its role some, say cpus: 0.1")
    needed = _total(list(bundles.values()))
    cluster = ray.cluster_resources()
    if any(amount > cluster.get(name, 0) for name, amount in needed.items()):
        raise ResourceError(f"the recipe needs {_show(needed)}, the cluster has {_show(_only(cluster, needed))}")
    group = placement_group(list(bundles.values()), strategy="PACK")
    start = time.monotonic()
    waited = 0.0
    while not group.wait(_whole_seconds(min(POLL_S, timeout_s - waited))):
        free = _show(_only(ray.available_resources(), needed))
        waited = time.monotonic() - start
        if waited >= timeout_s:
            remove_placement_group(group)
            raise ResourceError(
                f"no room for the roles after {waited:.0f} s: needed {_show(needed)}, free {free};"
                " end what holds them, or raise ray.placement_timeout_s"
            )
        say(f"waiting for the cluster: needed {_show(needed)}, free {free} ({waited:.0f} s of {timeout_s:.0f} s)")
    return group


def _whole_seconds(wait_s: float) -> int:
    """Round up: `PlacementGroup.wait` cuts fractions off, and does not wait at all below one second."""
    return max(1, math.ceil(wait_s))


def _total(bundles: list[dict[str, float]]) -> dict[str, float]:
    names = {name for bundle in bundles for name in bundle}
    return {name: sum(bundle.get(name, 0) for bundle in bundles) for name in sorted(names)}


def _only(resources: Mapping[str, float], wanted: Mapping[str, float]) -> dict[str, float]:
    return {name: resources.get(name, 0) for name in wanted}


def _show(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
