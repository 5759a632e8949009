"""What a schema cannot say: stages refer to earlier stages of the right kind, and numbers fit each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from rlhf.recipe.base import DataSource, Judge, LlmJudge, ModelJudge, StageData
from rlhf.recipe.check_roles import check_roles
from rlhf.recipe.check_tuning import check_tuning
from rlhf.recipe.messages import Finding, Loc, near
from rlhf.recipe.online_schema import OnlineDpoStage, OnlineStage, PolicyGradientStage, ReinforceStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import (
    STAGE_KINDS,
    AnnotateStage,
    ClassifyStage,
    CompareStage,
    RewardStage,
    SftStage,
    Stage,
    SynthesizeStage,
)

BASE = "base"
CHECKPOINT = "checkpoint"
NO_LANGUAGE_MODEL = ("annotate", "synthesize", "classify", "reward", "compare")
LANGUAGE_MODELS = (BASE, CHECKPOINT, *(kind for kind in STAGE_KINDS if kind not in NO_LANGUAGE_MODEL))


def check_references(recipe: Recipe) -> list[Finding]:
    """Return (location, message) for everything that does not fit together; empty when all is well."""
    findings = [*check_roles(recipe), *_seeds(recipe)]
    earlier: dict[str, str] = dict.fromkeys(recipe.checkpoints, CHECKPOINT) | {BASE: BASE}
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
    users = {name: stage.name for stage in reversed(recipe.stages) for _, name, _ in _references(stage)}
    return [*findings, *check_tuning(recipe, users)]


def _references(stage: Stage) -> Iterator[tuple[Loc, str, tuple[str, ...]]]:
    """Yield where a stage names another one, the name, and the kinds it may have."""
    match stage:
        case SftStage():
            yield ("init",), stage.init, LANGUAGE_MODELS
            yield from _data(stage.data, ("annotate", "synthesize"))
        case ClassifyStage():
            yield ("init",), stage.init, LANGUAGE_MODELS
        case SynthesizeStage():
            yield ("policy",), stage.policy, LANGUAGE_MODELS
        case AnnotateStage():
            yield ("policy",), stage.policy, LANGUAGE_MODELS
            yield from _judge(("judge",), stage.judge)
        case RewardStage():
            yield ("init",), stage.init, LANGUAGE_MODELS
            yield from _data(stage.data)
        case OnlineStage():
            yield ("policy",), stage.policy, LANGUAGE_MODELS
            yield from _judge(("reward",), stage.reward)
        case PreferenceStage():
            yield ("policy",), stage.policy, LANGUAGE_MODELS
            yield from _data(stage.data)
        case CompareStage():
            for index, name in enumerate(stage.candidates):
                yield ("candidates", index), name, LANGUAGE_MODELS
            yield from _judge(("gold",), stage.gold)
            if stage.reward:
                yield from _judge(("reward",), stage.reward)
            if stage.pairs:
                yield ("pairs",), stage.pairs, ("annotate",)


def _data(data: DataSource, kinds: tuple[str, ...] = ("annotate",)) -> Iterator[tuple[Loc, str, tuple[str, ...]]]:
    if isinstance(data, StageData):
        yield ("data", "stage"), data.stage, kinds


def _judge(loc: Loc, judge: Judge) -> Iterator[tuple[Loc, str, tuple[str, ...]]]:
    if isinstance(judge, ModelJudge):
        yield (*loc, "stage"), judge.stage, ("reward",)


def _reference_problem(
    name: str, kinds: tuple[str, ...], earlier: Mapping[str, str], names: Iterable[str]
) -> str | None:
    kind = earlier.get(name)
    if kind in kinds:
        return None
    fitting = [other for other, its_kind in earlier.items() if its_kind in kinds]
    if kind is not None:
        needed = "a language model" if kinds == LANGUAGE_MODELS else f"a stage of kind {' or '.join(kinds)}"
        there = f" (there are {', '.join(fitting)})" if fitting else ""
        return f"{name!r} is {_article(kind)}, but {needed} is needed here{there}"
    if name in names:
        return f"stage {name!r} comes later; a stage can only use earlier ones"
    return f"no stage is named {name!r}{near(name, fitting)}"


def _article(kind: str) -> str:
    plain = {BASE: "the base model", CHECKPOINT: "one of `checkpoints`"}
    return plain.get(kind, f"a stage of kind {kind}")


def _own_numbers(stage: Stage) -> Iterator[tuple[Loc, str]]:
    """Yield what is wrong inside one stage."""
    if isinstance(stage, OnlineStage):
        sequences = stage.prompts_per_step * stage.samples_per_prompt
        if isinstance(stage, OnlineDpoStage):
            sequences = stage.prompts_per_step
        if stage.minibatch_size > sequences:
            most = "prompts_per_step" if isinstance(stage, OnlineDpoStage) else "prompts_per_step * samples_per_prompt"
            yield ("minibatch_size",), f"must be at most {most} = {sequences}, got {stage.minibatch_size}"
        if isinstance(stage, ReinforceStage) and stage.baseline == "group" and stage.samples_per_prompt < 2:
            yield ("samples_per_prompt",), "baseline: group needs at least 2 samples of each prompt"
        if isinstance(stage, PolicyGradientStage) and stage.redraws and stage.samples_per_prompt < 2:
            yield (
                ("redraws",),
                "dynamic sampling compares a prompt's samples: samples_per_prompt must be at least 2",
            )
        if isinstance(stage, PolicyGradientStage) and stage.redraws and stage.staleness:
            yield (
                ("staleness",),
                "dynamic sampling (redraws) scores what it drew before it draws again, which cannot go on beside "
                "learning: set staleness: 0 or redraws: 0",
            )
        if isinstance(stage.reward, LlmJudge) and stage.samples_per_prompt < 2:
            yield (
                ("samples_per_prompt",),
                "a language model as judge compares a prompt's samples: must be at least 2",
            )
        if isinstance(stage, PolicyGradientStage) and stage.target_kl and stage.kl_coef == 0:
            yield ("target_kl",), "an adaptive kl_coef scales from where it starts, so kl_coef must be above 0"
        if stage.overlong and stage.overlong.buffer > stage.max_response_tokens:
            yield ("overlong", "buffer"), f"must be at most max_response_tokens = {stage.max_response_tokens}"
    if isinstance(stage, SynthesizeStage) and stage.max_words < stage.min_words:
        yield ("max_words",), f"must be at least min_words = {stage.min_words}, got {stage.max_words}"
    if isinstance(stage, CompareStage):
        if stage.baseline not in stage.candidates:
            hint = near(stage.baseline, stage.candidates)
            yield ("baseline",), f"{stage.baseline!r} is not among the candidates{hint}"
        for index, name in enumerate(stage.candidates):
            if name in stage.candidates[:index]:
                yield ("candidates", index), f"{name!r} is there twice"


def _seeds(recipe: Recipe) -> Iterator[Finding]:
    for index, seed in enumerate(recipe.seeds):
        if seed in recipe.seeds[:index]:
            yield ("seeds", index), f"{seed} is there twice"
        elif not 0 <= seed < 2**31:
            yield ("seeds", index), f"must be from 0 to {2**31 - 1}, got {seed}"
    for index, stage in enumerate(recipe.stages):
        if recipe.seeds and isinstance(stage, CompareStage):
            repeated = {s.name for s in recipe.stages if isinstance(s, OnlineStage | PreferenceStage)}
            if stage.baseline in repeated:
                why = f"{stage.baseline!r} runs once per seed; the baseline must be one model, say the common start"
                yield ("stages", index, "baseline"), why
