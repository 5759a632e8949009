"""Which backend runs a recipe's roles: this process, or Ray; and which devices they find there.

With the command line's own file, this is the only place in `rlhf` that imports `actors`, and only when a run on Ray
begins: the command line and the Python API both come here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.recipe.dtype import Devices
    from rlhf.recipe.schema import Recipe
    from rlhf.roles import Launcher


def launcher(recipe: Recipe) -> Callable[[Recipe], Launcher]:
    """Return what builds the roles of a recipe.

    Raises ResourceError where a Ray of this machine alone cannot hold them, or vLLM is not made for their devices.
    """
    if recipe.backend == "local":
        from rlhf.local import LocalLauncher

        return LocalLauncher
    if recipe.ray.address is None:
        from rlhf.recipe.resources import check_fits, local_resources
        from rlhf.recipe.vllm_build import check_engines

        check_fits(recipe, local_resources())
        check_engines(recipe)
    from actors.launch import RayLauncher

    return RayLauncher


def devices(recipe: Recipe, gpus: float) -> Devices:
    """Return what the roles may compute on: this machine's devices, `gpus` of them, or those of a cluster it joins."""
    if recipe.backend == "ray" and recipe.ray.address is not None:
        from actors.devices import ClusterDevices

        return ClusterDevices(recipe)
    from rlhf.recipe.dtype import Here

    return Here(gpus)
