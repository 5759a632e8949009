"""What a schema cannot say: stages refer to earlier stages of the right kind, and numbers fit each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from rlhf.recipe.base import Judge, ModelJudge, StageData
from rlhf.recipe.messages import Loc, near
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import (
    AnnotateStage,
    CompareStage,
    DpoStage,
    PpoStage,
    RewardStage,
    SftStage,
    Stage,
)

Finding: TypeAlias = "tuple[Loc, str]"
BASE = "base"
LANGUAGE_MODELS = (BASE, "sft", "ppo", "dpo")


def check_references(recipe: Recipe) -> list[Finding]:
    """Return (location, message) for everything that does not fit together; empty when all is well."""
    findings = [*_roles(recipe)]
    earlier: dict[str, str] = {BASE: BASE}
    names = {stage.name for stage in recipe.stages}
    for index, stage in enumerate(recipe.stages):
        loc: Loc = ("stages", index)
        if stage.name == BASE:
            findings.append(((*loc, "name"), "'base' is reserved for the model the recipe starts from"))
        elif stage.name in earlier:
            findings.append(((*loc, "name"), f"two stages are named {stage.name!r}"))
        for where, name, kinds in _references(stage):
            problem = _reference_problem(name, kinds, earlier, names)
            if problem:
                findings.append(((*loc, *where), problem))
        findings += [((*loc, *where), text) for where, text in _own_numbers(stage)]
        earlier.setdefault(stage.name, stage.kind)
    return findings


def _references(stage: Stage) -> Iterator[tuple[Loc, str, tuple[str, ...]]]:
    """Yield where a stage names another one, the name, and the kinds it may have."""
    match stage:
        case SftStage():
            yield ("init",), stage.init, LANGUAGE_MODELS
        case AnnotateStage():
            yield ("policy",), stage.policy, LANGUAGE_MODELS
            yield from _judge(("judge",), stage.judge)
        case RewardStage():
            yield ("init",), stage.init, LANGUAGE_MODELS
            if isinstance(stage.data, StageData):
                yield ("data", "stage"), stage.data.stage, ("annotate",)
        case PpoStage():
            yield ("policy",), stage.policy, LANGUAGE_MODELS
            yield from _judge(("reward",), stage.reward)
        case DpoStage():
            yield ("policy",), stage.policy, LANGUAGE_MODELS
            if isinstance(stage.data, StageData):
                yield ("data", "stage"), stage.data.stage, ("annotate",)
        case CompareStage():
            for index, name in enumerate(stage.candidates):
                yield ("candidates", index), name, LANGUAGE_MODELS
            yield from _judge(("gold",), stage.gold)
            yield from _judge(("reward",), stage.reward)


def _judge(loc: Loc, judge: Judge) -> Iterator[tuple[Loc, str, tuple[str, ...]]]:
    if isinstance(judge, ModelJudge):
        yield (*loc, "stage"), judge.stage, ("reward",)


def _reference_problem(
    name: str, kinds: tuple[str, ...], earlier: Mapping[str, str], names: Iterable[str]
) -> str | None:
    kind = earlier.get(name)
    if kind in kinds:
        return None
    if kind is not None:
        return f"{name!r} is {_article(kind)}, but one of kind {_either(kinds)} is needed here"
    if name in names:
        return f"stage {name!r} comes later; a stage can only use earlier ones"
    fitting = [other for other, its_kind in earlier.items() if its_kind in kinds]
    return f"no stage is named {name!r}{near(name, fitting)}"


def _article(kind: str) -> str:
    return "the base model" if kind == BASE else f"a stage of kind {kind}"


def _either(kinds: tuple[str, ...]) -> str:
    return " or ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)


def _own_numbers(stage: Stage) -> Iterator[tuple[Loc, str]]:
    """Yield what is wrong inside one stage."""
    if isinstance(stage, PpoStage):
        sequences = stage.prompts_per_step * stage.samples_per_prompt
        if stage.minibatch_size > sequences:
            yield (
                ("minibatch_size",),
                f"must be at most prompts_per_step * samples_per_prompt = {sequences}, got {stage.minibatch_size}",
            )
    if isinstance(stage, CompareStage):
        if stage.baseline not in stage.candidates:
            hint = near(stage.baseline, stage.candidates)
            yield ("baseline",), f"{stage.baseline!r} is not among the candidates{hint}"
        for index, name in enumerate(stage.candidates):
            if name in stage.candidates[:index]:
                yield ("candidates", index), f"{name!r} is there twice"


def _roles(recipe: Recipe) -> Iterator[Finding]:
    for name in type(recipe.roles).model_fields:
        gpus = getattr(recipe.roles, name).gpus
        if gpus > 1 and gpus != int(gpus):
            yield ("roles", name, "gpus"), f"must be whole above 1, got {gpus:g}"
    rollout = recipe.roles.rollout
    if rollout.gpus and rollout.tensor_parallel > 1 and rollout.gpus != rollout.tensor_parallel:
        needed = f"tensor_parallel: {rollout.tensor_parallel} needs gpus: {rollout.tensor_parallel} for each replica"
        yield ("roles", "rollout", "gpus"), f"{needed}, got {rollout.gpus:g}"
    if recipe.roles.reference.share == "policy":
        for stage in recipe.stages:
            if isinstance(stage, PpoStage) and (stage.lora or recipe.lora) == "full":
                why = f"stage {stage.name!r} trains all weights, so the policy cannot also be its own reference"
                yield ("roles", "reference", "share"), f"{why}; leave `share` out or train with LoRA"
