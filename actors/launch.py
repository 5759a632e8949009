"""Builds the roles as Ray actors: processes kept for the whole run, their models built per stage."""

from __future__ import annotations

import itertools
import logging
import math
import os
import secrets
import signal
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray._private import auto_init_hook, ray_constants
from ray._private.services import resolve_ip_for_localhost
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.group import RankGroup
from actors.head import HeadWatch
from actors.learner import LearnerActor, RayModel
from actors.placement import reserve, wait_for_room
from actors.restarts import Restarts
from actors.rollout import RayRollout, Replica
from actors.session import OwnSession
from actors.turns import SharingRollout, Turns
from actors.worker import learner_environment
from rlhf.engines.base import LearnerSpec, RolloutSpec
from rlhf.engines.environment import vllm_environment
from rlhf.errors import GuardError, ResourceError
from rlhf.fingerprint import architecture_digest
from rlhf.interrupts import Interrupted
from rlhf.recipe.placement import Bundle, Process, place
from rlhf.recipe.role_schema import RoleName
from rlhf.recipe.schema import Recipe

log = logging.getLogger("rlhf")
CONNECT_TIMEOUT_S = 10.0


class RayLauncher:
    """Starts or joins Ray, reserves the recipe's resources and builds roles on them."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.deadline_s = recipe.ray.call_timeout_s
        self.groups: dict[str, RankGroup] = {}
        self.engine: RayRollout | None = None
        self.shape = ""
        self.judging: tuple[RolloutSpec, RayRollout] | None = None
        self.turns = Turns()
        self.numbers = itertools.count()
        self.restarts: dict[RoleName, Restarts] = {}
        self.reserved: PlacementGroup | None = None
        self.bundles: tuple[Bundle, ...] = ()
        self.head: HeadWatch | None = None
        self.session = OwnSession()

    def policy(self, spec: LearnerSpec) -> RayModel:
        """Build the policy in its processes."""
        return self._model(spec)

    def reference(self, spec: LearnerSpec) -> RayModel:
        """Build the reference in its processes."""
        return self._model(spec)

    def reward(self, spec: LearnerSpec) -> RayModel:
        """Build the reward model in its processes."""
        return self._model(spec)

    def critic(self, spec: LearnerSpec) -> RayModel:
        """Build the critic in its processes."""
        return self._model(spec)

    def rollout(self, spec: RolloutSpec) -> RayRollout:
        """Start the engine's replicas; a later checkpoint of the same architecture is loaded into them."""
        shape = architecture_digest(spec.checkpoint)
        if self.engine is not None and shape != self.shape:
            self.engine.kill()
            self.engine = None
        if self.engine is None:
            self.engine, self.shape = self._engine("rollout", spec), shape
        else:
            self.engine.load(spec.checkpoint, 0).result()
        return self.engine

    def judge(self, spec: RolloutSpec) -> RayRollout:
        """Start the judge's replicas in their own processes; another model gets new ones in their place."""
        if self.judging is None or self.judging[0] != spec:
            if self.judging:
                self.judging[1].kill()
            self.judging = spec, self._engine("judge", spec)
        return self.judging[1]

    def seconds_in_turns(self) -> float:
        """Return the seconds spent so far on handing shared devices from the engine to models and back."""
        return self.turns.seconds

    def recover(self) -> None:
        """End all processes of models, and the engines where one is gone; the next stage starts new ones."""
        for group in self.groups.values():
            group.kill()
        self.groups.clear()
        self.turns.forget_models()
        if self.engine is not None and not self.engine.alive():
            self.engine.kill()
            self.engine = self.turns.engine = None
        if self.judging is not None and not self.judging[1].alive():
            self.judging[1].kill()
            self.judging = None

    def release(self) -> None:
        """Free the models; the processes and the engines stay for the next stage."""
        for group in self.groups.values():
            group.drop()

    def _engine(self, name: RoleName, spec: RolloutSpec) -> RayRollout:
        environment = vllm_environment(spec)
        processes = self._processes(name)

        def start(index: int) -> Any:
            return self._start(processes[index], Replica, environment, spec)

        numbers, sequences, restarts = range(len(processes)), spec.role.max_sequences, self._restarts(name)
        if spec.role.share is None:
            return RayRollout(list(map(start, numbers)), self.deadline_s, name, sequences, start, restarts)
        self.turns.begin()
        replicas = list(map(start, numbers))
        engine = SharingRollout(replicas, self.deadline_s, self.turns, sequences, start, restarts)
        engine.wait_until_ready()
        self.turns.began(engine)
        return engine

    def _restarts(self, role: RoleName) -> Restarts:
        return self.restarts.setdefault(role, Restarts(role, self.recipe.recovery.restarts))

    def _model(self, spec: LearnerSpec) -> RayModel:
        group = self._group(spec.role)
        group.build(spec)
        return RayModel(group)

    def _group(self, role: RoleName) -> RankGroup:
        """Return a role's processes, started where they are not yet."""
        if role not in self.groups:
            start = partial(self._ranks, role)
            self.groups[role] = RankGroup(role, start(), self.deadline_s, start, self._restarts(role))
            devices = getattr(getattr(self.recipe.roles, role), "share", None) or role
            if devices == self.recipe.roles.rollout.share:
                self.turns.join(self.groups[role])
        return self.groups[role]

    def _ranks(self, role: RoleName) -> list[Any]:
        learner, environment = ray.remote(LearnerActor), learner_environment()
        return [self._start(process, learner, environment) for process in self._processes(role)]

    def _processes(self, role: RoleName) -> list[Process]:
        return [process for bundle in self.bundles for process in bundle.processes if process.role == role]

    def _start(self, process: Process, kind: Any, environment: dict[str, str], *arguments: Any) -> Any:
        assert self.reserved is not None
        wait_for_room(self.reserved, self.bundles, self.recipe.ray.placement_timeout_s, log.warning)
        number = next(number for number, bundle in enumerate(self.bundles) if process in bundle.processes)
        remote = kind.options(
            name=f"{self.recipe.name}-{os.getpid()}-{process.name}-{next(self.numbers)}",
            num_cpus=process.cpus,
            num_gpus=process.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.reserved, placement_group_bundle_index=number),
            runtime_env={"env_vars": environment | self._visible_devices(process) | {"RLHF_PROCESS": process.name}},
        )
        log.info("starting %s", process.name)
        return remote.remote(*arguments)

    def _visible_devices(self, process: Process) -> dict[str, str]:
        """Return what shows a process without GPUs of its own those of its hosts, or none at all."""
        if process.gpus:
            return {}
        devices = []
        if process.guest_of:
            host = getattr(self.recipe.roles, process.role).share
            held = self._group(host).wait("devices")
            devices = [device for number in process.guest_of for device in held[number]]
        return {"CUDA_VISIBLE_DEVICES": ",".join(devices)}

    def __enter__(self) -> Self:
        """Start or join Ray and reserve what the recipe's stages use."""
        try:
            self._start_up()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def _start_up(self) -> None:
        self.bundles = place(self.recipe)
        on_terminate = signal.getsignal(signal.SIGTERM)
        try:
            _connect(self.recipe, self.bundles, self.session)
        except SystemExit as stop:
            if stop.code == signal.SIGTERM:  # what Ray's own handler does while it starts
                raise Interrupted(signal.SIGTERM) from None
            raise
        finally:
            signal.signal(signal.SIGTERM, on_terminate)
        self.head = HeadWatch(ray.get_runtime_context().gcs_address, log.error)
        self.reserved = reserve(self.bundles, self.recipe.ray.placement_timeout_s, log.warning)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every actor of this run and leave Ray; what a Ray of its own has left in the temporary folder goes."""
        try:
            self._leave()
        finally:
            self.session.remove(_is_failure(error))

    def _leave(self) -> None:
        if self.head:
            self.head.stop()
        for group in self.groups.values():
            group.kill()
        for engine in (self.engine, self.judging and self.judging[1]):
            if engine:
                engine.kill()
        if self.reserved is not None:
            remove_placement_group(self.reserved)
        ray.shutdown()


def _is_failure(error: BaseException | None) -> bool:
    """Return whether Ray's logs may tell why a run ended so."""
    return error is not None and not isinstance(error, Interrupted | KeyboardInterrupt | GuardError)


def _connect(recipe: Recipe, bundles: Sequence[Bundle], session: OwnSession) -> None:
    """Join the recipe's cluster, or start Ray on loopback; ResourceError when there is none or it does not start."""
    auto_init_hook.enable_auto_connect = False  # a thread that still waits at the end must not start Ray again
    if recipe.ray.address:
        _join(recipe.ray.address)
        return
    try:
        _start_on_loopback(math.ceil(sum(bundle.resources["CPU"] for bundle in bundles)), session.make())
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


def _start_on_loopback(slots: int, folder: Path) -> None:
    """Start Ray for this run alone, its files below `folder`; token authentication is Ray's default for a new one."""
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
        _temp_dir=str(folder),
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
