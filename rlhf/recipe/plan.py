"""What a run will do, before it starts: stages, roles, batches and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

from rlhf.recipe.base import LlmJudge
from rlhf.recipe.duration import estimate_seconds, matmul_rate
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.memory import Memory, Model, ModelShape, engine_memory, read_shape
from rlhf.recipe.online_schema import OnlineStage, PpoStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.resources import Resources, adapters, processes, reference_in_policy, threads, wanted
from rlhf.recipe.role_schema import RoleName, RolloutRole
from rlhf.recipe.schedule import Schedule, longest, microbatch_tokens, schedule
from rlhf.recipe.schema import Recipe
from rlhf.recipe.seeds import expand_seeds, method
from rlhf.recipe.stage_schema import SftStage, Stage, judges

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class RolePlan:
    """A role in one stage; memory is of each of its `processes`."""

    role: RoleName
    processes: int
    gpus: float
    threads: int
    parameters: int
    trainable: int
    memory: Memory


@dataclass(frozen=True)
class StagePlan:
    """One stage: who takes part, and how much work it is."""

    name: str
    kind: str
    roles: tuple[RolePlan, ...]
    schedule: Schedule

    @property
    def main_memory(self) -> int:
        """Bytes of main memory that its CPU roles are estimated to need at once."""
        return sum(role.processes * role.memory.total for role in self.roles if not role.gpus)


@dataclass(frozen=True)
class Plan:
    """A run; `processes` maps each role to where it runs, in words; `seconds` is a rough duration, where known."""

    name: str
    backend: str
    model: str
    parameters: int
    resources: Resources
    processes: dict[str, str]
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]
    seconds: float | None


def make_plan(loaded: LoadedRecipe, resources: Resources) -> Plan:
    """Derive the plan of a recipe; the base model is fetched or converted for its config, no weight is loaded.

    Memory is estimated as `Model.memory` and `engine_memory` say. Raises RecipeError when there is no such model.
    """
    from rlhf.models.loading import resolve_model

    recipe = expand_seeds(loaded.recipe)
    shape = read_shape(resolve_model(recipe.model))
    stages = tuple(_stage_plan(recipe, stage, shape, int(resources.cpus)) for stage in recipe.stages)
    return Plan(
        name=recipe.name,
        backend=recipe.backend,
        model=recipe.model.path,
        parameters=shape.parameters,
        resources=resources,
        processes=_places(recipe),
        stages=stages,
        warnings=tuple(_warnings(recipe, stages, resources)),
        seconds=_seconds(recipe, shape.parameters),
    )


def _seconds(recipe: Recipe, parameters: int) -> float | None:
    """Return the estimate for this machine; a cluster's speed is not known from here."""
    if recipe.ray.address is not None:
        return None
    return estimate_seconds(recipe, parameters, matmul_rate(recipe.model.dtype))


def headline(plan: Plan) -> str:
    """Return the first line of a run: its stages, which role runs where, and how long it may take."""
    stages = " -> ".join(_titles(plan.stages))
    roles = ", ".join(f"{name} {place}" for name, place in plan.processes.items())
    backend = "on Ray" if plan.backend == "ray" else "in this process"
    duration = "" if plan.seconds is None else f"; roughly {max(1, round(plan.seconds / 60))} min"
    return f"{plan.name}: {stages}; {backend}: {roles}{duration}"


def render_plan(plan: Plan) -> RenderableType:
    """Return the plan for a terminal: the headline, warnings, the work of each stage, and who does it."""
    from rich.console import Group
    from rich.text import Text

    largest = max(plan.stages, key=lambda stage: stage.main_memory)
    there = plan.resources
    lines = [
        headline(plan),
        f"model: {plan.model}, {_count(plan.parameters)} parameters",
        f"main memory: about {_gib(largest.main_memory)} GiB at once (stage {largest.name}), beside the libraries",
        f"available: {there.cpus:g} CPUs, {there.gpus:g} GPUs, {_gib(there.memory_bytes)} GiB",
        *(f"warning: {text}" for text in plan.warnings),
    ]
    return Group(*(Text(line) for line in lines), _work_table(plan), _role_table(plan))


def _work_table(plan: Plan) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", "work", box=box.SIMPLE_HEAD, pad_edge=False)
    for stage in plan.stages:
        figures = (f"{name.replace('_', ' ')} {count:,}" for name, count in stage.schedule.items())
        table.add_row(Text(_title(stage)), ", ".join(figures))
    return table


def _role_table(plan: Plan) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, caption="memory in GiB of each process, estimated"
    )
    table.add_column("stage, role", no_wrap=True)
    for column in ("n", "GPUs", "threads", "trained", "weights", "optim.", "activ.", "KV"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan.stages:
        table.add_row(Text(_title(stage)))
        for role in stage.roles:
            memory = role.memory
            parts = (memory.weights, memory.optimizer, memory.activations, memory.kv_cache)
            counts = (str(role.processes), f"{role.gpus:g}", str(role.threads), _count(role.trainable))
            table.add_row(f"  {role.role}", *counts, *(_gib(part) for part in parts))
    return table


def _stage_plan(recipe: Recipe, stage: Stage, shape: ModelShape, cores: int) -> StagePlan:
    from rlhf.models.loading import resolve_judge

    cpu_threads = threads(recipe, stage, cores)
    roles = []
    for name, want in wanted(recipe, stage).items():
        judge = _judge(stage) if name == "judge" else None
        model = _model(recipe, stage, name, read_shape(resolve_judge(judge.model)) if judge else shape)
        memory = model.memory(microbatch_tokens(stage))
        if judge:
            memory = engine_memory(model.shape, recipe.model.dtype, recipe.roles.judge, judge.max_prompt_tokens + 1)
        if name == "rollout":
            memory = engine_memory(shape, recipe.model.dtype, recipe.roles.rollout, longest(recipe))
        roles.append(
            RolePlan(name, want.count, want.gpus, cpu_threads[name], model.parameters, model.trainable, memory)
        )
    return StagePlan(stage.name, stage.kind, tuple(roles), schedule(recipe, stage))


def _judge(stage: Stage) -> LlmJudge:
    return next(judge for judge in judges(stage) if isinstance(judge, LlmJudge) and judge.url is None)


def _model(recipe: Recipe, stage: Stage, role: RoleName, shape: ModelShape) -> Model:
    """Return the copy of the model that a role holds in a stage."""
    match stage:
        case SftStage() | PreferenceStage():
            trained = role == "policy"
        case OnlineStage():
            trained = role in ("policy", "critic")
        case _:
            trained = stage.kind == "reward" and role == "reward"
    chosen = stage.critic_lora if isinstance(stage, PpoStage) and role == "critic" else getattr(stage, "lora", None)
    scalar = role in ("reward", "critic")
    return Model(shape, recipe.model.dtype, scalar, trained, adapters(recipe, chosen) if trained else None)


def _places(recipe: Recipe) -> dict[str, str]:
    places: dict[str, str] = {}
    for name, want in processes(recipe).items():
        where = f"{want.gpus:g} GPU" if want.gpus else "CPU"
        count = f"{want.count} x " if want.count > 1 else ""
        role = getattr(recipe.roles, name)
        engine = f" ({role.engine})" if isinstance(role, RolloutRole) else ""
        places[name] = f"{count}{where}{engine}"
    if any(isinstance(stage, OnlineStage) and reference_in_policy(recipe, stage) for stage in recipe.stages):
        places["reference"] = "in policy"
    return places


def _warnings(recipe: Recipe, stages: tuple[StagePlan, ...], resources: Resources) -> list[str]:
    """Return what will not stop the run at once but is likely to hurt it."""
    found = []
    for stage, plan in zip(recipe.stages, stages, strict=True):
        if recipe.ray.address is None and plan.main_memory > resources.memory_bytes:
            needed, there = _gib(plan.main_memory), _gib(resources.memory_bytes)
            found.append(f"stage {stage.name} is estimated to need {needed} GiB of main memory, there are {there}")
        prompts = plan.schedule.get("prompts")
        if isinstance(stage, OnlineStage) and prompts is not None and prompts < stage.prompts_per_step:
            found.append(f"stage {stage.name} has {prompts} prompts but takes {stage.prompts_per_step} a step")
    return found


def _titles(stages: Sequence[StagePlan]) -> list[str]:
    """Return the stages' titles, the runs of one stage under several seeds as one."""
    titles = []
    for name, runs in groupby(stages, key=lambda stage: method(stage.name)):
        first, *others = runs
        title = _title(replace(first, name=name))
        titles.append(f"{title} x {1 + len(others)} seeds" if others else title)
    return titles


def _title(stage: StagePlan) -> str:
    return stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f}M" if parameters >= 100_000 else f"{parameters:,}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
