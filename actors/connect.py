"""A run's connection to Ray: a Ray of its own on loopback, always with a token, or a cluster that it joins."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence

import ray
from ray._private import auto_init_hook, ray_constants
from ray._private.services import canonicalize_bootstrap_address

from actors.authentication import MODE, RayVariables, asks_token, fresh_token, token_found
from actors.session import OwnSession
from rlhf.errors import ResourceError
from rlhf.recipe.placement import Bundle
from rlhf.recipe.schema import Recipe
from rlhf.untrusted import printable

log = logging.getLogger("rlhf")
OPEN = "this Ray cluster has no token authentication: anyone who reaches it can run code on it"
UNCLEAR = "this Ray cluster does not say whether it has token authentication"


class Connection:
    """This process in Ray; `close` leaves it, and gives back the environment that the process had."""

    def __init__(self) -> None:
        self.variables = RayVariables()
        self.session = OwnSession()
        self.clusters = ray_constants.ENABLE_RAY_CLUSTER

    def start(self, slots: int) -> None:
        """Start a Ray for this run alone, on loopback, with a token made for it."""
        # Ray turns 127.0.0.1 into the machine's outside address, and listens there, unless it may not form clusters.
        ray_constants.ENABLE_RAY_CLUSTER = False
        alone = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0", "RAY_USAGE_STATS_ENABLED": "0"}
        self.variables.set(fresh_token() | alone)
        ray.init(
            address="local",
            num_cpus=max(slots, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(self.session.make()),
        )

    def join(self, address: str) -> None:
        """Join the cluster whose head is at `host:port`, or `auto`, with a token if, and only if, it asks for one."""
        head = canonicalize_bootstrap_address(address)
        if head is None:
            raise ResourceError("RAY_ADDRESS names no cluster")
        asks = asks_token(head)  # ray.init would try for ever where nothing listens
        if asks and not token_found():
            raise ResourceError("it wants a token, and there is none here")
        if asks is not None:
            self.variables.set({MODE: "token" if asks else "disabled"})
        ray.init(address=head, log_to_driver=False, logging_level=logging.ERROR)
        if not asks:
            log.warning(OPEN if asks is False else UNCLEAR)

    def close(self, failed: bool) -> None:
        """Leave Ray, which ends a Ray of this run's own, and remove what it has left; see `restore`."""
        ray.shutdown()
        self.restore(failed)

    def restore(self, failed: bool) -> None:
        """Remove the files of a Ray of this run's own, and give back the environment that the process had.

        Of a run that `failed`, the last lines of Ray's logs go to `run.log` first.
        """
        self.session.remove(failed)
        self.variables.restore()
        ray_constants.ENABLE_RAY_CLUSTER = self.clusters


def connect(recipe: Recipe, bundles: Sequence[Bundle]) -> Connection:
    """Join the recipe's cluster, or start a Ray that holds the bundles; ResourceError when neither comes about."""
    if ray.is_initialized():
        raise ResourceError("Ray is in use in this process already: end that with ray.shutdown() before a run")
    auto_init_hook.enable_auto_connect = False  # a thread that still waits at the end must not start Ray again
    connection = Connection()
    try:
        if recipe.ray.address:
            _join(connection, recipe.ray.address)
        else:
            _start(connection, math.ceil(sum(bundle.resources["CPU"] for bundle in bundles)))
    except BaseException:
        connection.close(failed=True)
        raise
    return connection


def _join(connection: Connection, address: str) -> None:
    try:
        connection.join(address)
    except (OSError, RuntimeError, ValueError, ResourceError) as error:
        raise ResourceError(
            f"ray.address: cannot join a Ray cluster at {address}: {_first_line(error)}; is it up, and is"
            " RAY_AUTH_TOKEN set here if it has token authentication?"
        ) from error


def _start(connection: Connection, slots: int) -> None:
    try:
        connection.start(slots)
    except Exception as error:  # Ray raises plain Exception when its processes are not up in 30 s
        raise ResourceError(
            f"Ray did not start on this machine: {_first_line(error)}; is it overloaded, or out of memory or disk?"
        ) from error


def _first_line(error: Exception) -> str:
    return printable(next(iter(str(error).splitlines()), type(error).__name__))
