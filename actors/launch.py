"""Builds the roles as Ray actors: one process per role, kept for the whole run, its model built per stage."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import socket
from types import TracebackType
from typing import Any, Self

import ray
from ray._private import ray_constants
from ray._private.services import resolve_ip_for_localhost
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.learner import LearnerActor, RayModel
from actors.placement import reserve
from actors.rollout import RayRollout, RolloutActor
from actors.supervise import wait_for
from actors.worker import learner_environment
from rlhf.engines.base import LearnerSpec, RolloutSpec
from rlhf.engines.environment import vllm_environment
from rlhf.errors import ResourceError
from rlhf.fingerprint import architecture_digest
from rlhf.recipe.resources import wanted
from rlhf.recipe.role_schema import Role, RolloutRole
from rlhf.recipe.schema import Recipe

log = logging.getLogger("rlhf")
CONNECT_TIMEOUT_S = 10.0


class RayLauncher:
    """Starts or joins Ray, reserves the recipe's resources and builds roles on them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.deadline_s = recipe.ray.call_timeout_s
        self.actors: dict[str, Any] = {}
        self.engine: RayRollout | None = None
        self.shape = ""
        self.judging: tuple[RolloutSpec, RayRollout] | None = None
        self.started = 0
        self.group: PlacementGroup | None = None
        self.bundles: dict[str, dict[str, float]] = {}

    def policy(self, spec: LearnerSpec) -> RayModel:
        """Build the policy in its process."""
        return self._model(spec)

    def reference(self, spec: LearnerSpec) -> RayModel:
        """Build the reference in its process."""
        return self._model(spec)

    def reward(self, spec: LearnerSpec) -> RayModel:
        """Build the reward model in its process."""
        return self._model(spec)

    def critic(self, spec: LearnerSpec) -> RayModel:
        """Build the critic in its process."""
        return self._model(spec)

    def rollout(self, spec: RolloutSpec) -> RayRollout:
        """Start the engine's replicas; a later checkpoint of the same architecture is loaded into them."""
        shape = architecture_digest(spec.checkpoint)
        if self.engine is not None and shape != self.shape:
            for replica in self.engine.replicas:
                ray.kill(replica)
            self.engine = None
        if self.engine is None:
            self.engine, self.shape = self._engine("rollout", spec), shape
        else:
            self.engine.load(spec.checkpoint, 0).result()
        return self.engine

    def judge(self, spec: RolloutSpec) -> RayRollout:
        """Start the judge's replicas in their own processes; another model gets new ones in their place."""
        if self.judging is None or self.judging[0] != spec:
            for replica in self.judging[1].replicas if self.judging else ():
                ray.kill(replica)
            self.judging = spec, self._engine("judge", spec)
        return self.judging[1]

    def release(self) -> None:
        """Free the models; the processes and the engines stay for the next stage."""
        wait_for([actor.drop.remote() for actor in self.actors.values()], "drop", self.deadline_s)

    def _engine(self, name: str, spec: RolloutSpec) -> RayRollout:
        environment = vllm_environment(spec.threads, spec.role.kv_cache_gib)
        names = [f"{name}-{index}" for index in range(spec.role.replicas)]
        replicas = [self._start(replica, RolloutActor, spec.role, environment, spec) for replica in names]
        return RayRollout(replicas, self.deadline_s, name)

    def _model(self, spec: LearnerSpec) -> RayModel:
        if spec.role not in self.actors:
            role = getattr(self.recipe.roles, spec.role)
            self.actors[spec.role] = self._start(spec.role, LearnerActor, role, learner_environment())
        actor = self.actors[spec.role]
        # Errors of the build reach the first call that waits; actor calls keep their order.
        building = actor.build.remote(spec)
        return RayModel(actor, spec.role, self.deadline_s, building)

    def _start(self, name: str, kind: type, role: Role, environment: dict[str, str], *arguments: Any) -> Any:
        assert self.group is not None
        place = PlacementGroupSchedulingStrategy(
            self.group, placement_group_bundle_index=list(self.bundles).index(name)
        )
        remote = ray.remote(kind).options(
            name=f"{self.recipe.name}-{os.getpid()}-{name}-{self.started}",
            num_cpus=role.cpus,
            num_gpus=role.gpus,
            scheduling_strategy=place,
            runtime_env={"env_vars": environment},
        )
        self.started += 1
        log.info("starting %s", name)
        return remote.remote(*arguments)

    def __enter__(self) -> Self:
        """Start or join Ray and reserve what the recipe's stages use."""
        self.bundles = _bundles(self.recipe)
        on_terminate = signal.getsignal(signal.SIGTERM)
        _connect(self.recipe, self.bundles)
        signal.signal(signal.SIGTERM, on_terminate)  # Ray puts its own there
        try:
            self.group = reserve(self.bundles, self.recipe.ray.placement_timeout_s, log.warning)
        except BaseException:
            ray.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every actor of this run and leave Ray."""
        engines = [engine for engine in (self.engine, self.judging and self.judging[1]) if engine]
        for actor in [*self.actors.values(), *(replica for engine in engines for replica in engine.replicas)]:
            ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)
        ray.shutdown()


def _bundles(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Return the resources of each process that some stage uses."""
    used = {role for stage in recipe.stages for role in wanted(recipe, stage)}
    bundles: dict[str, dict[str, float]] = {}
    for name in type(recipe.roles).model_fields:
        role: Role = getattr(recipe.roles, name)
        if name not in used:
            continue
        resources = {"CPU": role.cpus} | ({"GPU": role.gpus} if role.gpus else {})
        names = [f"{name}-{index}" for index in range(role.replicas)] if isinstance(role, RolloutRole) else [name]
        bundles |= dict.fromkeys(names, resources)
    return bundles


def _connect(recipe: Recipe, bundles: dict[str, dict[str, float]]) -> None:
    """Join the recipe's cluster, or start Ray on loopback; ResourceError when there is none or it does not start."""
    if recipe.ray.address:
        _join(recipe.ray.address)
        return
    try:
        _start_on_loopback(math.ceil(sum(bundle["CPU"] for bundle in bundles.values())))
    except Exception as error:  # Ray raises plain Exception when its processes are not up in 30 s
        raise ResourceError(
            f"Ray did not start on this machine: {_first_line(error)}; is it overloaded, or out of memory or disk?"
        ) from error


def _join(address: str) -> None:
    try:
        if address != "auto":  # ray.init would try for ever where nothing listens
            host, _, port = address.rpartition(":")
            socket.create_connection((resolve_ip_for_localhost(host), int(port)), CONNECT_TIMEOUT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"ray.address: cannot join a Ray cluster at {address}: {_first_line(error)}; is it up, and is"
            " RAY_AUTH_TOKEN set here if it has token authentication?"
        ) from error
    if os.environ.get("RAY_AUTH_MODE") != "token":
        log.warning("this Ray cluster has no token authentication: anyone who reaches it can run code on it")


def _start_on_loopback(slots: int) -> None:
    """Start Ray for this run alone; token authentication is Ray's default for a new one."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray turns 127.0.0.1 into the machine's outside address, and listens there, unless it may not form clusters.
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
    ray_constants.ENABLE_RAY_CLUSTER = False
    ray.init(
        address="local",
        num_cpus=max(slots, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
