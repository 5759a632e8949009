"""What a run will do, before it starts: stages, roles, batches, memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby

from rlhf.errors import RecipeError, RlhfError
from rlhf.recipe.base import Dtype, LlmJudge, StageData
from rlhf.recipe.check_tuning import check_model
from rlhf.recipe.devices import Device
from rlhf.recipe.duration import estimate_seconds, matmul_rate
from rlhf.recipe.fit import Fit, Shapes, check_memory, remedies
from rlhf.recipe.host_fit import run_memory
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.memory import Memory
from rlhf.recipe.model_shape import Model, ModelShape, read_shape
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.phases import Phase, stage_memory
from rlhf.recipe.process_memory import HostMemory
from rlhf.recipe.products import cpu_products
from rlhf.recipe.resources import Resources, on_gpu, processes, reference_in_policy, threads, wanted
from rlhf.recipe.role_schema import RoleName, RolloutRole
from rlhf.recipe.row_lengths import Measured, narrowed
from rlhf.recipe.schedule import Schedule, longest, schedule, sequence_tokens
from rlhf.recipe.schema import Recipe
from rlhf.recipe.seeds import expand_seeds, method
from rlhf.recipe.smallest import Smallest, smallest
from rlhf.recipe.stage_base import MARK
from rlhf.recipe.stage_schema import AnnotateStage, Stage, judges
from rlhf.recipe.step_time import OnlineStep, StepWork, online_step, step_work
from rlhf.recipe.tuning_schema import Lora

LONG_S = 7200.0
"""A duration from which on it is told in hours."""


@dataclass(frozen=True)
class RolePlan:
    """A role in one stage; memory by phase is of each of its `processes`, of an engine on each of its GPUs.

    `tuning` is how it trains, `peak` the phase in which it is largest, and `host_bytes` what each process offloads.
    """

    role: RoleName
    processes: int
    gpus: float
    threads: int
    parameters: int
    tuning: str
    trainable: int
    phases: Mapping[Phase, Memory]
    peak: Phase
    host_bytes: int

    @property
    def memory(self) -> Memory:
        """The parts at the peak."""
        return self.phases[self.peak]


@dataclass(frozen=True)
class StagePlan:
    """One stage: who takes part, how much work it is, and what a step of it is for each rank."""

    name: str
    kind: str
    roles: tuple[RolePlan, ...]
    schedule: Schedule
    step: StepWork | None
    online: OnlineStep | None
    memory: HostMemory


@dataclass(frozen=True)
class Plan:
    """A run; `processes` maps each role to where it runs, in words; `seconds` is a rough duration, where known.

    `disturbed` says that other programs ran while this machine's speed was measured. `usual_length` is how many tokens
    the longest prompt of the data and a whole response have.

    With GPUs to plan for, `fit` says whether they hold it, `remedies` what would help, and `smallest` how few suffice.
    """

    name: str
    backend: str
    model: str
    dtype: Dtype
    parameters: int
    resources: Resources
    processes: dict[str, str]
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]
    seconds: float | None
    usual_length: int
    disturbed: bool = False
    notes: tuple[str, ...] = ()
    device: Device | None = None
    fit: Fit | None = None
    remedies: tuple[str, ...] = ()
    searched: bool = False
    smallest: Smallest | None = None


@dataclass(frozen=True)
class Known:
    """What a plan is made from beside the recipe: the shapes of its models, and how long the rows of its data are."""

    shapes: Shapes
    measured: Measured


def look_up(recipe: Recipe) -> Known:
    """Read the models' configs and measure the data; the base model is fetched or converted, no weight is loaded.

    Without a tokenizer that can be loaded nothing is known of the data. Raises RecipeError when there is no such model.
    """
    from rlhf.data.lengths import measured_lengths
    from rlhf.models.loading import resolve_model
    from rlhf.models.tokenizer import load_tokenizer

    folder = resolve_model(recipe.model)
    shapes, measured = Shapes(read_shape(folder), _judges(recipe)), {}
    with suppress(RlhfError):
        measured = measured_lengths(recipe, load_tokenizer(folder))
    return Known(shapes, measured)


def make_plan(
    loaded: LoadedRecipe,
    resources: Resources,
    device: Device | None = None,
    search: bool = False,
    known: Known | None = None,
) -> Plan:
    """Derive the plan of a recipe whose dtype is decided (`rlhf.recipe.dtype`).

    `known` is `look_up` of the recipe with its seeds expanded, made here otherwise.

    `device` is what each GPU is; `search` finds the fewest of them. Raises as `look_up` does.
    """
    recipe = expand_seeds(loaded.recipe)
    known = known or look_up(recipe)
    shapes, real = known.shapes, narrowed(recipe, known.measured)
    check_model(recipe, shapes.base)
    fit = check_memory(recipe, shapes, device) if device else None
    memory = run_memory(recipe, shapes, known.measured)
    stages = tuple(
        _stage_plan(recipe, stage, shapes, int(resources.cpus), device, real, held)
        for stage, held in zip(recipe.stages, memory, strict=True)
    )
    wants_gpus = any(want.gpus for want in processes(recipe).values())
    here = recipe.ray.address is None and (resources.gpus > 0 or not wants_gpus)
    rate, disturbed = _rate(recipe, resources.gpus) if here else (0.0, False)
    return Plan(
        name=recipe.name,
        backend=recipe.backend,
        model=recipe.model.path,
        dtype=recipe.model.precision,
        parameters=shapes.base.parameters,
        resources=resources,
        processes=_places(recipe),
        stages=stages,
        warnings=tuple(_warnings(recipe, stages)),
        seconds=estimate_seconds(recipe, shapes.base, rate, known.measured) if here else None,
        usual_length=longest(real),
        disturbed=disturbed,
        device=device,
        fit=fit,
        remedies=remedies(recipe, shapes, device) if device and fit and fit.problems else (),
        searched=search,
        smallest=smallest(recipe, shapes, device) if device and search else None,
    )


def check_lengths(recipe: Recipe, shape: ModelShape) -> None:
    """Raise RecipeError when a stage may generate more tokens than the base model has positions."""
    for stage in recipe.stages:
        length = sequence_tokens(stage)
        if shape.positions and length > shape.positions:
            raise RecipeError(
                f"stages.{stage.name.partition(MARK)[0]}: max_prompt_tokens + max_response_tokens = {length}, but "
                f"{recipe.model.path} has {shape.positions} positions; lower one of them"
            )


def headline(plan: Plan) -> str:
    """Return the first line of a run: its stages, which role runs where, and how long it may take."""
    stages = " -> ".join(_titles(plan.stages))
    roles = ", ".join(f"{name} {place}" for name, place in plan.processes.items())
    backend = "on Ray" if plan.backend == "ray" else "in this process"
    minutes = "" if plan.seconds is None else f"; roughly {in_words(plan.seconds)}"
    duration = minutes + (" at the speed that other programs leave" if minutes and plan.disturbed else "")
    return f"{plan.name}: {stages}; {backend}: {roles}{duration}"


def title(stage: StagePlan) -> str:
    """Return a stage's name, and its kind where that is another word."""
    return stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"


def gib(size: float) -> str:
    """Return bytes as GiB."""
    return f"{size / 2**30:.2f}"


def _titles(stages: Sequence[StagePlan]) -> list[str]:
    """Return the stages' titles, the runs of one stage under several seeds as one."""
    titles = []
    for name, runs in groupby(stages, key=lambda stage: method(stage.name)):
        first, *others = runs
        shown = title(replace(first, name=name))
        titles.append(f"{shown} x {1 + len(others)} seeds" if others else shown)
    return titles


def _judges(recipe: Recipe) -> dict[str, ModelShape]:
    """Return by stage the shape of the language model that judges here."""
    from rlhf.models.loading import resolve_judge

    local = {
        stage.name: judge.model
        for stage in recipe.stages
        for judge in judges(stage)
        if isinstance(judge, LlmJudge) and judge.url is None
    }
    return {name: read_shape(resolve_judge(model)) for name, model in local.items()}


def _rate(recipe: Recipe, gpus: float) -> tuple[float, bool]:
    """Return this machine's rate of products, and whether other programs disturbed its measurement."""
    fast = any(on_gpu(recipe, role, gpus > 0) for role in processes(recipe).values())
    return matmul_rate(recipe.model.precision, fast), not fast and cpu_products().disturbed


def _stage_plan(
    recipe: Recipe, stage: Stage, shapes: Shapes, cores: int, device: Device | None, real: Recipe, held: HostMemory
) -> StagePlan:
    cpu_threads = threads(recipe, stage, cores)
    memory = stage_memory(recipe, stage, shapes.base, shapes.judges.get(stage.name), device, real)
    roles = tuple(
        RolePlan(
            role=name,
            processes=want.count,
            gpus=want.gpus,
            threads=cpu_threads[name],
            parameters=memory[name].model.parameters,
            tuning=_method(memory[name].model),
            trainable=memory[name].model.trainable,
            phases=memory[name].phases,
            peak=memory[name].peak,
            host_bytes=memory[name].host,
        )
        for name, want in wanted(recipe, stage).items()
    )
    online = online_step(recipe, stage, shapes.base, device) if isinstance(stage, OnlineStage) else None
    return StagePlan(stage.name, stage.kind, roles, schedule(recipe, stage), step_work(recipe, stage), online, held)


def _method(model: Model) -> str:
    """Return what of a model trains, as the recipe calls it; nothing for one that is only asked."""
    tuning = model.tuning
    if isinstance(tuning, Lora):
        chosen = {"rslora": tuning.rslora, "dora": tuning.dora, "pissa": tuning.init == "pissa"}
        return "+".join(["lora", *(name for name, wanted in chosen.items() if wanted)])
    return tuning.kind if tuning else ""


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


def _warnings(recipe: Recipe, stages: tuple[StagePlan, ...]) -> list[str]:
    """Return what will not stop the run at once but is likely to hurt it."""
    found = []
    for stage, plan in zip(recipe.stages, stages, strict=True):
        prompts = plan.schedule.get("prompts")
        if isinstance(stage, OnlineStage) and prompts is not None and prompts < stage.prompts_per_step:
            found.append(f"stage {stage.name} has {prompts} prompts but takes {stage.prompts_per_step} a step")
        limit, most = getattr(stage, "max_length", None), _sampled_tokens(recipe, stage)
        if limit is not None and most > limit:
            found.append(
                f"stage {stage.name} stops at rows over max_length {limit}; what it reads may have {most} tokens"
            )
    return found


def _sampled_tokens(recipe: Recipe, stage: Stage) -> int:
    """Return the most tokens of the rows that an annotate stage makes for a stage; 0 for other data."""
    data = getattr(stage, "data", None)
    sources = {other.name: other for other in recipe.stages if isinstance(other, AnnotateStage)}
    source = sources.get(data.stage) if isinstance(data, StageData) else None
    return source.max_prompt_tokens + source.max_response_tokens if source else 0


def in_words(seconds: float) -> str:
    """Return a duration in minutes, or in hours where it is long."""
    return f"{max(1, round(seconds / 60))} min" if seconds < LONG_S else f"{seconds / 3600:.1f} h"
