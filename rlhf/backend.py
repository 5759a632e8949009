"""Which backend runs a recipe's roles: this process, or Ray.

With the command line's own file, this is the only place in `rlhf` that imports `actors`, and only when a run on Ray
begins: the command line and the Python API both come here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf.recipe.schema import Recipe
    from rlhf.roles import Launcher


def launcher(recipe: Recipe) -> Callable[[Recipe], Launcher]:
    """Return what builds the roles of a recipe.

    Raises ResourceError where a Ray of this machine alone cannot hold them.
    """
    if recipe.backend == "local":
        from rlhf.local import LocalLauncher

        return LocalLauncher
    if recipe.ray.address is None:
        from rlhf.recipe.resources import check_fits, local_resources

        check_fits(recipe, local_resources())
    else:
        offer_token()
    from actors.launch import RayLauncher

    return RayLauncher


def offer_token() -> None:
    """Let Ray show its token to a cluster where there is one; it reads this once, when imported."""
    stored = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or stored.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
