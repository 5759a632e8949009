"""The fewest GPUs of a kind on which a recipe fits, found by trying layouts from the smallest up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

from rlhf.recipe.check_roles import check_roles
from rlhf.recipe.check_tuning import check_tuning
from rlhf.recipe.devices import Device
from rlhf.recipe.fit import Shapes, check_memory, with_role
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.placement import place
from rlhf.recipe.resources import processes
from rlhf.recipe.role_schema import ReferenceRole, RoleName, Roles
from rlhf.recipe.schema import Recipe
from rlhf.recipe.tuning_support import support

Layout = Literal["together", "rollout apart", "apart"]
IN_POLICY = ReferenceRole(share="policy")
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
RANKS = (1, 2, 4, 8, 16, 32, 64)
WIDTHS = (1, 2, 4, 8)
UTILIZATION = (0.85, 0.6, 0.4)
"""Shares of a GPU that are tried for an engine that takes turns with the policy."""


@dataclass(frozen=True)
class Smallest:
    """The fewest `gpus`, and the roles that need them: only keys that differ from the defaults."""

    gpus: int
    roles: dict[str, dict[str, Any]]

    def block(self) -> str:
        """Return the `roles:` section of a recipe."""
        lines = (
            f"  {name}: {{{', '.join(f'{key}: {_yaml(keys[key])}' for key in keys)}}}"
            for name, keys in self.roles.items()
        )
        return "\n".join(("roles:", *lines))


def smallest(recipe: Recipe, shapes: Shapes, device: Device) -> Smallest | None:
    """Return the layout with the fewest GPUs that fits, the simplest among equals; None beyond 64 ranks a role.

    Tried are ranks, ZeRO stage 2 and 3, tensor parallelism, and which roles share the policy's GPUs: all of them, all
    but the engine, none; where nothing fits, all with gradient checkpointing. The rest is as in the recipe.
    """
    saving = recipe
    for name in ("policy", "reward", "critic"):
        saving = with_role(saving, name, gradient_checkpointing=True)
    for start in (recipe, saving):
        found = [made for layout in LAYOUTS if (made := _fewest(start, layout, shapes, device))]
        if found:
            best = min(found, key=_gpus)
            return Smallest(_gpus(best), _different(best))
    return None


def _fewest(recipe: Recipe, layout: Layout, shapes: Shapes, device: Device) -> Recipe | None:
    """Return the smallest roles of a layout, each group of GPUs chosen by itself, as it is full or not by itself."""
    hosts: dict[RoleName, tuple[float, Recipe]] = {}
    for changed in _layouts(recipe, layout, shapes):
        crowded = check_memory(changed, shapes, device).crowded
        for name, want in processes(changed).items():
            host, gpus = want.shares or name, want.gpus * want.count
            if host == name and host not in crowded and gpus < hosts.get(host, (float("inf"), changed))[0]:
                hosts[host] = gpus, changed
    first = next(_layouts(recipe, layout, shapes), None)
    if first is None:
        return None
    made, used = recipe, processes(first)
    for name, want in used.items():
        if (want.shares or name) not in hosts:
            return None
        role = getattr(hosts[want.shares or name][1].roles, name)
        made = made.model_copy(update={"roles": made.roles.model_copy(update={name: role})})
    if "reference" not in used and any(isinstance(stage, OnlineStage) for stage in recipe.stages):
        made = made.model_copy(update={"roles": made.roles.model_copy(update={"reference": IN_POLICY})})
    wrong = [*check_roles(made), *check_tuning(made, {})]
    return None if wrong or check_memory(made, shapes, device).problems else made


def _layouts(recipe: Recipe, layout: Layout, shapes: Shapes) -> Iterator[Recipe]:
    used = processes(recipe)
    for ranks, zero_stage, width in product(RANKS, (2, 3), WIDTHS):
        if (zero_stage == 3 and ranks == 1) or shapes.base.heads % width:
            continue
        if layout == "together" and (ranks % width or "policy" not in used):
            continue
        for share in UTILIZATION if layout == "together" and "rollout" in used else (None,):
            yield _layout(recipe, ranks, zero_stage, layout, width, share)


def _layout(recipe: Recipe, ranks: int, zero_stage: int, layout: Layout, width: int, share: float | None) -> Recipe:
    learner: dict[str, Any] = {"gpus": 1, "ranks": ranks, "zero_stage": zero_stage}
    used = processes(recipe)
    guests = "policy" in used and layout != "apart"
    for name in ("policy", "reference", "reward", "critic"):
        # A host need not share, and with adapters the reference is the policy with them off.
        own: dict[str, Any] = {} if name == "policy" else {"share": "policy" if guests else None}
        if name == "reference" and support(recipe.tuning).reference:
            own = {"share": "policy"}
        recipe = with_role(recipe, name, **learner, **own)
        if name != "policy" and own["share"]:
            recipe = with_role(recipe, name, gpus=0)
    together = layout == "together"
    engine: dict[str, Any] = {"gpus": 0 if together else width, "tensor_parallel": width}
    if together:
        engine |= {"share": "policy", "replicas": ranks // width, "gpu_memory_utilization": share or 0.85}
    else:
        engine |= {"share": None, "replicas": 1}
    recipe = with_role(recipe, "rollout", **engine)
    return with_role(recipe, "judge", gpus=1, replicas=1, tensor_parallel=1)


def _gpus(recipe: Recipe) -> int:
    return round(sum(bundle.resources.get("GPU", 0) for bundle in place(recipe)))


def _different(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the keys of the roles in use that are not defaults."""
    names: list[RoleName] = list(processes(recipe))
    if recipe.roles.reference.share and "reference" not in names:
        names.append("reference")
    plain = Roles()
    found = {}
    for name in names:
        keys, default = getattr(recipe.roles, name).model_dump(), getattr(plain, name).model_dump()
        found[name] = {key: value for key, value in keys.items() if value != default[key]}
    return {name: keys for name, keys in found.items() if keys}


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
