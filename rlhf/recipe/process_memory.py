"""Main memory of a whole run on one machine, stage by stage: every process, its libraries included."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.recipe.base import FunctionJudge, ModelJudge
from rlhf.recipe.online_schema import PpoStage
from rlhf.recipe.phases import Phase, RoleMemory, stage_phases
from rlhf.recipe.resources import Wanted, wanted
from rlhf.recipe.role_schema import RoleName, RolloutRole
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import Stage, judges

MIB = 1 << 20
CONTROLLER, RAY = 560 * MIB, 370 * MIB
"""Proportional set sizes of the command itself, and of Ray's own processes on one machine."""

LEARNER, ENGINE = 330 * MIB, 870 * MIB
"""The libraries of a process that learns or scores, and of one that generates with vLLM."""

FUNCTION = 65 * MIB
"""A process of a reward function that imports nothing large."""

WEIGHTS_SENT = 2 * 64 * MIB
"""Shared memory through which weights reach an engine on the same machine."""


@dataclass(frozen=True)
class HostMemory:
    """Bytes of main memory at the fullest moment of a stage: by process, and of all together."""

    stage: str
    phase: Phase
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """The sum of all processes."""
        return sum(self.parts.values())


def host_memory(recipe: Recipe, roles: Mapping[str, Mapping[RoleName, RoleMemory]]) -> list[HostMemory]:
    """Return each stage's fullest moment; `roles` holds the memory of its roles by stage and role.

    Processes start with the first stage that uses them and stay: a model leaves its process after each stage, an engine
    keeps its weights and cache. In one process (`backend: local`) there is the command alone.
    """
    found = []
    started: dict[RoleName, int] = {}
    for stage in recipe.stages:
        here = wanted(recipe, stage)
        moments = []
        for phase in stage_phases(stage):
            held = {name: _held(recipe, name, roles[stage.name][name], want, phase) for name, want in here.items()}
            idle = {name: size for name, size in started.items() if name not in held}
            moments.append(
                HostMemory(stage.name, phase, _own(recipe, stage) | idle | _shared(recipe, stage, held, roles))
            )
        found.append(max(moments, key=lambda moment: moment.total))
        started |= {name: _between(recipe, name, roles[stage.name][name], want) for name, want in here.items()}
    return found


def _own(recipe: Recipe, stage: Stage) -> dict[str, int]:
    """Return what is there beside the roles."""
    functions = sum(judge.workers for judge in judges(stage) if isinstance(judge, FunctionJudge))
    own = {"command": CONTROLLER} | ({"reward functions": functions * FUNCTION} if functions else {})
    return own | ({"ray": RAY} if recipe.backend == "ray" else {})


def _held(recipe: Recipe, name: RoleName, memory: RoleMemory, want: Wanted, phase: Phase) -> int:
    """Return the main memory of a role's processes in a phase."""
    held = memory.host + (0 if want.gpus else memory.phases[phase].total)
    return want.count * (held + _libraries(recipe, name))


def _between(recipe: Recipe, name: RoleName, memory: RoleMemory, want: Wanted) -> int:
    """Return what a role's processes hold when a stage is over."""
    kept = memory.engine.awake.total if memory.engine and not want.gpus else 0
    return want.count * (kept + _libraries(recipe, name))


def _libraries(recipe: Recipe, name: RoleName) -> int:
    if recipe.backend != "ray":
        return 0
    role = getattr(recipe.roles, name)
    if not isinstance(role, RolloutRole):
        return LEARNER
    return ENGINE + WEIGHTS_SENT if role.engine == "vllm" else LEARNER


def _shared(
    recipe: Recipe, stage: Stage, held: Mapping[RoleName, int], roles: Mapping[str, Mapping[RoleName, RoleMemory]]
) -> dict[str, int]:
    """Return the roles' memory, less the frozen weights that two of them map from the same file.

    PPO's critic starts from the reward model, and with adapters neither of them changes these weights.
    """
    found: dict[str, int] = {str(name): size for name, size in held.items()}
    if not (isinstance(stage, PpoStage) and isinstance(stage.reward, ModelJudge)):
        return found
    critic, reward = roles[stage.name]["critic"], roles[stage.name]["reward"]
    if not critic.model.full and recipe.backend == "ray" and not recipe.roles.critic.gpus:
        found["critic"] -= reward.model.weight_bytes
    return found
