"""What `model.dtype: auto` is: one decision for a whole run, by the devices that its roles compute on.

Bfloat16 on GPUs that have it and on CPUs that multiply it faster than float32, float32 elsewhere. A run folder keeps
the dtype that it began with, wherever the run resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from rlhf.errors import RecipeError
from rlhf.recipe.base import Dtype
from rlhf.recipe.devices import Device, bfloat16_gpus
from rlhf.recipe.products import cpu_products
from rlhf.recipe.resources import on_gpu, processes
from rlhf.recipe.role_schema import ModelRole, RoleName
from rlhf.recipe.schema import Recipe

SINGLE = "zero_stage: 0 on several ranks trains float32 alone"
AGAIN = "--set model.dtype={} makes the stages again in it"


@dataclass(frozen=True)
class Speed:
    """What a kind of device is fast at; `slower`: so many times slower are bfloat16 products, None if not measured."""

    device: str
    dtype: Dtype
    slower: float | None = None

    @property
    def why(self) -> str:
        """In words, why that dtype and not the other."""
        if self.slower is None:
            return f"{'there are' if self.dtype == 'bfloat16' else 'no'} bfloat16 products on {self.device}"
        if self.dtype == "float32":
            return f"bfloat16 products are {self.slower:.2g} times slower than float32 on {self.device}"
        return f"bfloat16 products are {1 / self.slower:.2g} times as fast as float32 on {self.device}"


class Devices(Protocol):
    """What a recipe's roles may compute on."""

    @property
    def cpu(self) -> Speed:
        """The CPUs."""
        ...

    @property
    def gpu(self) -> Speed:
        """The GPUs."""
        ...

    @property
    def visible(self) -> bool:
        """Whether this process sees GPUs, which a role in it then takes."""
        ...


class Here:
    """This machine's devices, each asked when it matters; `planned` GPUs take the place of its own."""

    def __init__(self, gpus: float = 0, planned: Device | None = None) -> None:
        self.gpus = gpus
        self.planned = planned

    @property
    def visible(self) -> bool:
        """Whether there is a GPU."""
        return self.gpus > 0

    @cached_property
    def cpu(self) -> Speed:
        """The CPU, measured."""
        products = cpu_products()
        return Speed("this CPU", products.faster, products.slower)

    @cached_property
    def gpu(self) -> Speed:
        """The GPUs; those of an unknown kind elsewhere are taken for ones that have bfloat16, as all since 2020."""
        if self.planned is not None:
            return Speed(f"GPUs like {self.planned.name}", "bfloat16" if self.planned.bfloat16 else "float32")
        without = [name for name, able in bfloat16_gpus() if not able] if self.gpus else []
        return Speed(", ".join(dict.fromkeys(without)) or "the GPUs", "float32" if without else "bfloat16")


@dataclass(frozen=True)
class Decision:
    """A recipe whose dtype is decided; `notes` say how, `warnings` what it costs."""

    recipe: Recipe
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def decide(recipe: Recipe, devices: Devices, kept: Dtype | None = None) -> Decision:
    """Return the recipe with its dtype; `kept` is that of the run folder, where there is one.

    `auto` is what the run folder has, or else the faster dtype of the GPUs where any role is on one, and of the CPU
    otherwise. Only what matters is measured: nothing for a recipe that says float32.
    """
    written = recipe.model.dtype
    if written == "float32":
        return Decision(recipe)
    leading = devices.gpu if _roles(recipe, devices)[0] else devices.cpu
    if written == "bfloat16":
        return Decision(recipe, warnings=tuple(_costs(recipe, devices, leading)))
    single = kept is None and _trains_float32_only(recipe)
    if kept == "bfloat16" and _trains_float32_only(recipe):
        raise RecipeError(f"model.dtype: the run folder began in bfloat16, and {SINGLE}; {AGAIN.format('float32')}")
    dtype: Dtype = kept or ("float32" if single else leading.dtype)
    decided = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    if kept is not None and kept != leading.dtype:
        held = f"model.dtype: the run keeps {kept}, in which it began; {leading.why}"
        return Decision(decided, warnings=(f"{held}; {AGAIN.format(leading.dtype)}",))
    if dtype == "bfloat16":
        return Decision(decided, warnings=tuple(_costs(recipe, devices, leading)))
    why = SINGLE if single else leading.why
    return Decision(decided, notes=(f"model.dtype: auto is {dtype} here: {why}",) if kept is None else ())


def _roles(recipe: Recipe, devices: Devices) -> tuple[list[RoleName], list[RoleName]]:
    """Return the roles on GPUs and those on CPUs."""
    names: tuple[list[RoleName], list[RoleName]] = ([], [])
    for name, role in processes(recipe).items():
        names[0 if on_gpu(recipe, role, devices.visible) else 1].append(name)
    return names


def _costs(recipe: Recipe, devices: Devices, leading: Speed) -> Iterator[str]:
    """Yield what bfloat16 costs where the devices of some roles are slow at it."""
    remedy = "model.dtype: auto is float32 here" if leading.dtype == "float32" else "give these roles GPUs too"
    for kind, names in zip(("gpu", "cpu"), _roles(recipe, devices), strict=True):
        speed: Speed | None = getattr(devices, kind) if names else None
        if speed is not None and speed.dtype == "float32":
            yield f"model.dtype: bfloat16 for {', '.join(names)}: {speed.why}; {remedy}"


def _trains_float32_only(recipe: Recipe) -> bool:
    roles = (getattr(recipe.roles, name) for name in processes(recipe))
    return any(isinstance(role, ModelRole) and role.ranks > 1 and role.zero_stage == 0 for role in roles)
