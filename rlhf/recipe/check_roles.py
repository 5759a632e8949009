"""What roles ask for that cannot be, and which of them can stand on the same devices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from rlhf.recipe.messages import Finding
from rlhf.recipe.online_schema import PolicyGradientStage
from rlhf.recipe.role_schema import ModelRole, Role, RoleName, RolloutRole, TrainedRole
from rlhf.recipe.schema import Recipe


def check_roles(recipe: Recipe) -> Iterator[Finding]:
    """Yield where roles ask for what cannot be, on any machine."""
    for name in get_args(RoleName):
        role = getattr(recipe.roles, name)
        for where, problem in (*_amounts(name, role), *_sharing(recipe, name, role)):
            yield ("roles", name, where), problem
        if isinstance(role, TrainedRole) and role.offload == "parameters" and role.zero_stage != 3:
            yield ("roles", name, "offload"), "parameters leave the device with zero_stage: 3 only"
        if isinstance(role, TrainedRole) and role.offload == "optimizer" and role.zero_stage == 0:
            yield ("roles", name, "offload"), "the optimizer leaves the device with zero_stage: 1, 2 or 3"
        if isinstance(role, ModelRole) and role.ranks > 1 and role.zero_stage == 0 and recipe.model.dtype == "bfloat16":
            why = "ZeRO stage 0 cannot train bfloat16 weights: use 1, 2 or 3, or model.dtype: float32"
            yield ("roles", name, "zero_stage"), why
    if recipe.roles.rollout.share == "policy":
        for index, stage in enumerate(recipe.stages):
            if isinstance(stage, PolicyGradientStage) and stage.staleness:
                why = "the engine takes turns with the policy on its devices (roles.rollout.share: policy)"
                yield ("stages", index, "staleness"), f"cannot generate while it learns: {why}; set staleness: 0"


def _amounts(name: RoleName, role: Role) -> Iterator[tuple[str, str]]:
    if role.gpus > 1 and role.gpus != int(role.gpus):
        yield "gpus", f"must be whole above 1, got {role.gpus:g}"
    elif isinstance(role, ModelRole) and role.gpus > 1:
        yield "gpus", f"a rank computes on one GPU, got {role.gpus:g}; use ranks: {role.gpus:g} with gpus: 1"
    if isinstance(role, ModelRole) and role.ranks > 1 and 0 < role.gpus < 1:
        yield "gpus", f"two ranks of one model cannot share a GPU: each of the {role.ranks} needs gpus: 1"
    if isinstance(role, RolloutRole) and role.gpus and role.tensor_parallel > 1 and role.gpus != role.tensor_parallel:
        needed = f"tensor_parallel: {role.tensor_parallel} needs gpus: {role.tensor_parallel} for each replica"
        yield "gpus", f"{needed}, got {role.gpus:g}"


def _sharing(recipe: Recipe, name: RoleName, role: Role) -> Iterator[tuple[str, str]]:
    """Yield what is wrong with a role that stands on another one's devices."""
    host = getattr(role, "share", None)
    if host is None:
        return
    owner: ModelRole = getattr(recipe.roles, host)
    beyond = getattr(owner, "share", None)
    if role.gpus:
        yield "gpus", f"the role shares the devices of {host}, so it has none of its own; leave gpus out"
    if beyond is not None:
        yield "share", f"{host} shares the devices of {beyond} itself; name that one"
    elif isinstance(role, RolloutRole):
        width = role.tensor_parallel
        if owner.ranks % width or role.replicas * width > owner.ranks:
            why = f"{role.replicas} replicas of tensor_parallel {width} do not fit the {owner.ranks} ranks of {host}"
            yield "share", f"{why}; there is room for replicas: {owner.ranks // width} with tensor_parallel: {width}"
    elif isinstance(role, ModelRole) and role.ranks > owner.ranks:
        yield "ranks", f"must be at most the {owner.ranks} of {host}, whose devices it shares, got {role.ranks}"
