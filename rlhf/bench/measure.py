"""Measures part after part; what cannot be measured says why, and the rest goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

from rlhf.bench.child import Child
from rlhf.bench.figures import BenchResult, Figure, Part, names_of, with_needs
from rlhf.bench.machine import machine, settings, versions
from rlhf.bench.setting import LEARNERS, Setting
from rlhf.recipe.schema import Recipe

log = logging.getLogger("rlhf")

Measurement = Callable[[Sequence[Figure]], list[Figure]]
"""Takes the figures so far, among them the limits, and returns more."""

Cluster = Callable[[Setting], AbstractContextManager[Mapping[Part, Measurement]]]
"""Starts what measures the parts that need Ray, and ends it."""

WITH_RAY: tuple[Part, ...] = ("rollouts", "transfer", "ray")
TITLES: dict[Part, str] = {
    "gemm": "matrix products",
    "copy": "copying memory",
    "learners": "learning",
    "rollouts": "generating",
    "transfer": "publishing weights",
    "ray": "calls through Ray",
}


@dataclass(frozen=True)
class Options:
    """What to measure; `environment` is that of a role's process, `seconds` scales how long each part may take."""

    recipe: Recipe | None = None
    only: Sequence[Part] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 1.0


def measure(options: Options, cluster: Cluster, say: Callable[[str], None]) -> BenchResult:
    """Measure the parts asked for, and those that their limits need; `say` hears what is being measured.

    Raises RecipeError when the recipe's model cannot be had. Whatever else fails is the reason of a figure.
    """
    here = machine()
    setting = Setting.of(options.recipe, len(here["gpus"]), options.seconds)
    parts = with_needs(options.only)
    figures: list[Figure] = []
    environment = {**options.environment, **({} if setting.on_gpus else {"CUDA_VISIBLE_DEVICES": ""})}
    with Child(environment) as child:
        for part, names, work in _without_ray(parts):
            say(f"{TITLES[part]}: {', '.join(names)}")
            figures += guarded(names, partial(child.call, work, setting, list(figures)))
    _with_ray([part for part in parts if part in WITH_RAY], cluster, setting, figures, say)
    return BenchResult(here, versions(), settings(setting), figures)


def guarded(names: Sequence[str], work: Callable[[], list[Figure]]) -> list[Figure]:
    """Return the work's figures, or those names with the reason why there are none."""
    try:
        return work()
    except Exception as error:  # whatever a library raises, it is what the user is told of this figure
        log.debug("%s: not measured", ", ".join(names), exc_info=True)
        return [Figure(name, None, reason=reason(error)) for name in names]


def reason(error: BaseException) -> str:
    """Return the first line of an error that says something, or its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _without_ray(parts: Sequence[Part]) -> Iterator[tuple[Part, list[str], Callable[..., list[Figure]]]]:
    from rlhf.bench.ceilings import measure_copy, measure_gemm
    from rlhf.bench.learners import measure_learner

    for part in parts:
        if part == "gemm":
            yield part, names_of(part), measure_gemm
        elif part == "copy":
            yield part, names_of(part), measure_copy
        elif part == "learners":
            for kind in LEARNERS:
                yield part, [kind], partial(measure_learner, kind)


def _with_ray(
    parts: Sequence[Part], cluster: Cluster, setting: Setting, figures: list[Figure], say: Callable[[str], None]
) -> None:
    """Measure the parts in one cluster; when it does not start, its reason is that of each of them."""
    if not parts:
        return
    waiting = list(parts)
    say("starting Ray")
    try:
        with cluster(setting) as measurements:
            while waiting:
                part = waiting.pop(0)
                say(TITLES[part])
                figures += guarded(names_of(part), partial(measurements[part], list(figures)))
    except Exception as error:
        log.debug("Ray: not measured", exc_info=True)
        figures += [Figure(name, None, reason=reason(error)) for part in waiting for name in names_of(part)]
