"""What a sink is, and all that a recipe asks for as one."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from rlhf.errors import RecipeError
from rlhf.installing import engine_command, extra_command
from rlhf.privacy import public
from rlhf.recipe.schema import Recipe
from rlhf.untrusted import printable

log = logging.getLogger("rlhf")
Name = Literal["wandb", "tensorboard", "trackio"]


class Sink(Protocol):
    """Gets the metrics of every stage; it may fail, and the run goes on without it."""

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Take the metrics of a finished step."""
        ...

    def rewind(self, stage: str, step: int) -> None:
        """Forget what came after a step, as far as it can: the stage goes on from there (0: begins)."""
        ...

    def close(self, failed: bool) -> None:
        """Write what is left; `failed` says that the run did not come to its end."""
        ...


class Sinks:
    """Several sinks as one; one that fails is named in a warning, once, and gets nothing more."""

    def __init__(self) -> None:
        self.open: dict[str, Sink] = {}

    def add(self, name: str, make: Callable[[], Sink]) -> None:
        """Open a sink."""
        try:
            self.open[name] = make()
        except Exception as error:
            _warn(name, error)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Give all of them the metrics of a step."""
        self._each(lambda sink: sink.log(stage, step, metrics))

    def rewind(self, stage: str, step: int) -> None:
        """Have all of them forget what came after a step."""
        self._each(lambda sink: sink.rewind(stage, step))

    def close(self, failed: bool) -> None:
        """Close all of them."""
        self._each(lambda sink: sink.close(failed))
        self.open.clear()

    def _each(self, tell: Callable[[Sink], None]) -> None:
        for name, sink in list(self.open.items()):
            try:
                tell(sink)
            except Exception as error:
                del self.open[name]
                _warn(name, error)


@contextmanager
def open_sinks(recipe: Recipe, folder: Path) -> Iterator[Sinks]:
    """Open the sinks that the recipe asks for, and close them at the end, in whatever way it comes.

    Raises RecipeError, before anything is opened, where a sink's package is not installed.
    """
    tracking = recipe.tracking
    wanted: dict[Name, object] = {
        "wandb": tracking.wandb, "tensorboard": tracking.tensorboard, "trackio": tracking.trackio
    }  # fmt: skip
    names = [name for name, settings in wanted.items() if settings]
    for name in names:
        if importlib.util.find_spec(name) is None:
            how = engine_command() if name == "wandb" else extra_command(name)  # wandb comes with all the rest
            raise RecipeError(f"tracking.{name}: needs the package {name}: {how}")
    sinks = Sinks()
    for name in names:
        sinks.add(name, lambda name=name: _maker(name)(recipe, folder))  # type: ignore[misc]
    failed = True
    try:
        yield sinks
        failed = False
    finally:
        sinks.close(failed)


def told(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe for a sink: all except where metrics go and which machines there are, made public."""
    told: dict[str, Any] = public(recipe.model_dump(mode="json", exclude={"tracking", "ray"}))
    return told


def _maker(name: str) -> Callable[[Recipe, Path], Sink]:
    module = importlib.import_module(f"rlhf.sinks.{name}")
    maker: Callable[[Recipe, Path], Sink] = module.open_sink
    return maker


def _warn(name: str, error: Exception) -> None:
    reason = printable(f"{type(error).__name__}: {error}".splitlines()[0], 300)
    log.warning("tracking.%s failed and gets nothing more; the run goes on: %s", name, reason)
