"""What a lock lacks: the requirements of its own packages, extras included, that no line of it satisfies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CLUSTER = Path(__file__).parents[1] / "cluster"


def locked(*names: str) -> dict[str, str]:
    """Return package -> version of lock files of `cluster/` together."""
    text = "\n".join((CLUSTER / f"requirements-{name}.txt").read_text() for name in names)
    return {
        canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    }


def gaps(lock: Mapping[str, str], wanted: Iterable[Requirement]) -> set[tuple[str, str]]:
    """Return who requires what that is not in the lock in a fitting version: (package, requirement's name)."""
    found: set[tuple[str, str]] = set()
    waiting = [("the project", requirement) for requirement in wanted]
    waiting += [("the lock", Requirement(name)) for name in lock]
    seen: set[tuple[str, str]] = set()
    while waiting:
        owner, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in lock or not requirement.specifier.contains(lock[name], prereleases=True):
            found.add((owner, name))
            continue
        for extra in requirement.extras or {""}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += [(name, inner) for inner in required(name, lock[name], extra)]
    return found


def unknown(lock: Mapping[str, str]) -> set[str]:
    """Return the packages of a lock whose requirements cannot be read here, since they are not installed."""
    return {name for name, version in lock.items() if lines(name, version) is None}


def required(name: str, version: str, extra: str) -> Iterator[Requirement]:
    """Yield what a package requires on this machine, with an extra of its own or (empty) without."""
    for line in lines(name, version) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield requirement


def lines(name: str, version: str) -> list[str] | None:
    """Return the requirements of an installed package, None where this version of it is not installed."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    return (found.requires or []) if found.version.partition("+")[0] == version.partition("+")[0] else None
