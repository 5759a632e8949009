"""Builds the roles as Ray actors: processes kept for the whole run, their models built per stage."""

from __future__ import annotations

import itertools
import logging
import os
import signal
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.connect import Connection, connect
from actors.group import RankGroup
from actors.head import HeadWatch, leave_lost_head
from actors.learner import LearnerActor, RayModel
from actors.placement import reserve, wait_for_room
from actors.progress import forget_job
from actors.restarts import Restarts
from actors.rollout import RayRollout, Replica
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
        self.connection: Connection | None = None
        self.head: HeadWatch | None = None

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
            group.kill(elsewhere=True)
        self.groups.clear()
        self.turns.forget_models()
        if self.engine is not None and not self.engine.alive():
            self.engine.kill(elsewhere=True)
            self.engine = self.turns.engine = None
        if self.judging is not None and not self.judging[1].alive():
            self.judging[1].kill(elsewhere=True)
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
        start_s = self.recipe.ray.start_timeout_s
        if spec.role.share is None:
            return RayRollout(list(map(start, numbers)), self.deadline_s, name, sequences, start, restarts, start_s)
        self.turns.begin()
        replicas = list(map(start, numbers))
        engine = SharingRollout(replicas, self.deadline_s, self.turns, sequences, start, restarts, start_s)
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
            start_s = self.recipe.ray.start_timeout_s
            self.groups[role] = RankGroup(role, start(), self.deadline_s, start, self._restarts(role), start_s)
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
            self.connection = connect(self.recipe, self.bundles)
        except SystemExit as stop:
            if stop.code == signal.SIGTERM:  # what Ray's own handler does while it starts
                raise Interrupted(signal.SIGTERM) from None
            raise
        finally:
            signal.signal(signal.SIGTERM, on_terminate)
        self.head = HeadWatch(ray.get_runtime_context().gcs_address, log.error)
        self.reserved = reserve(self.bundles, self.recipe.ray.placement_timeout_s, log.warning)

    def _leave_lost(self, head: HeadWatch, why: str, error: BaseException | None) -> NoReturn:
        left = leave_lost_head()
        head.left.set()
        if self.connection is not None:
            self.connection.restore(failed=True)
        stuck = "" if left else "; Ray does not let go of this process: start a new one for that"
        raise ResourceError(why + stuck) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every actor of this run and leave Ray; ResourceError where Ray's head was lost."""
        if self.connection is None:
            return
        if self.head and (why := self.head.settle()):
            self._leave_lost(self.head, why, error)
        try:
            self._end_processes()
        finally:
            self.connection.close(_is_failure(error))

    def _end_processes(self) -> None:
        for group in self.groups.values():
            group.kill()
        for engine in (self.engine, self.judging and self.judging[1]):
            if engine:
                engine.kill()
        if self.reserved is not None:
            remove_placement_group(self.reserved)
        forget_job()


def _is_failure(error: BaseException | None) -> bool:
    """Return whether Ray's logs may tell why a run ended so."""
    return error is not None and not isinstance(error, Interrupted | KeyboardInterrupt | GuardError)
