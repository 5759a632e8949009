"""What was measured: figures with their limits, and the machine that they are of; as JSON and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Part = Literal["gemm", "copy", "learners", "rollouts", "transfer", "ray"]
PARTS: tuple[Part, ...] = get_args(Part)

NEEDS: dict[Part, set[Part]] = {
    "learners": {"gemm"},
    "rollouts": {"gemm", "copy"},
    "transfer": {"copy"},
    "ray": {"copy"},
}
"""Parts whose figures are the limits of another part's."""


@dataclass(frozen=True)
class Kind:
    """What a figure is: the part that measures it, its unit, and what a bad value means, in plain words."""

    part: Part
    unit: str
    low: str


KINDS: dict[str, Kind] = {
    "gemm bfloat16": Kind(
        "gemm", "TFLOP/s", "near float32's or below: no bfloat16 instructions here, float32 may be as fast"
    ),
    "gemm float32": Kind("gemm", "TFLOP/s", "far below other machines of the kind: busy, throttled, or few threads"),
    "gemm head": Kind("gemm", "TFLOP/s", "a low share: writing logits is the limit, so scoring fewer positions helps"),
    "copy": Kind("copy", "GB/s", "memory is slow or busy: generation and weight transfer suffer first"),
    "sft": Kind("learners", "tokens/s", "a low share: passes too small; raise max_tokens_per_microbatch or batch_size"),
    "dpo": Kind("learners", "tokens/s", "a low share: passes too small; raise max_tokens_per_microbatch or batch_size"),
    "reward": Kind("learners", "tokens/s", "a low share: passes too small; raise max_tokens_per_microbatch"),
    "ppo": Kind("learners", "tokens/s", "a low share: minibatches too small; raise minibatch_size, or the threads"),
    "rollouts": Kind("rollouts", "tokens/s", "a low share: the engine's own work per step; raise max_sequences"),
    "publish": Kind("transfer", "s", "many seconds: they come on top of every step; see publish rate"),
    "publish rate": Kind("transfer", "GB/s", "a low share: merging adapters and loading cost more than moving bytes"),
    "call": Kind("ray", "ms", "above 5 ms: the cores are busy or Ray's processes are on another machine"),
    "fan-out": Kind("ray", "ms", "much above four calls: too few cores for the processes"),
    "batch": Kind("ray", "GB/s", "a low share: little shared memory, or the object store spills to disk"),
}


@dataclass(frozen=True)
class Figure:
    """One measurement: `value` in the unit of its kind, None where `reason` says why there is none.

    `on` says where: `2 threads`, `GPU`. `limit` is what the hardware allows, in the same unit.
    """

    name: str
    value: float | None
    on: str = ""
    limit: float | None = None
    reason: str = ""

    @property
    def kind(self) -> Kind:
        """What it is."""
        return KINDS[self.name]

    @property
    def fraction(self) -> float | None:
        """The share of the limit that is reached; None without either."""
        return None if self.value is None or not self.limit else self.value / self.limit

    def as_dict(self) -> dict[str, Any]:
        """Return all there is to say of it, JSON values only."""
        said = {"name": self.name, "part": self.kind.part, "on": self.on, "value": self.value, "unit": self.kind.unit}
        return said | {"limit": self.limit, "fraction": self.fraction, "low": self.kind.low, "reason": self.reason}


@dataclass(frozen=True)
class BenchResult:
    """All figures, with the machine, the versions of the libraries and the settings that they hold for."""

    machine: Mapping[str, Any]
    versions: Mapping[str, str | None]
    settings: Mapping[str, Any]
    figures: Sequence[Figure] = field(default_factory=list)

    @property
    def measured(self) -> bool:
        """Whether anything could be measured."""
        return any(figure.value is not None for figure in self.figures)

    def to_json(self) -> str:
        """Return it as JSON."""
        parts = {"machine": self.machine, "versions": self.versions, "settings": self.settings}
        return json.dumps({**parts, "figures": [figure.as_dict() for figure in self.figures]}, indent=2)

    @staticmethod
    def from_json(text: str) -> BenchResult:
        """Return what `to_json` wrote."""
        read = json.loads(text)
        names = ("name", "value", "on", "limit", "reason")
        figures = [Figure(**{name: figure[name] for name in names}) for figure in read["figures"]]
        return BenchResult(read["machine"], read["versions"], read["settings"], figures)


def found(figures: Iterable[Figure], name: str, on: str) -> float | None:
    """Return the value of a figure that was measured, in its unit; None where it was not."""
    return next((figure.value for figure in figures if (figure.name, figure.on) == (name, on)), None)


def names_of(part: Part) -> list[str]:
    """Return the names of a part's figures."""
    return [name for name, kind in KINDS.items() if kind.part == part]


def with_needs(only: Iterable[Part]) -> list[Part]:
    """Return the parts with those that measure their limits, in the order in which they run; none means all."""
    wanted = set(only) or set(PARTS)
    needed = wanted.union(*(NEEDS.get(part, set()) for part in wanted))
    return [part for part in PARTS if part in needed]
