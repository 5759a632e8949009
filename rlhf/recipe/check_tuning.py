"""Which tuning methods fit a stage, the roles it uses, and a model."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping

from rlhf.errors import RecipeError
from rlhf.installing import extra_command
from rlhf.recipe.messages import Finding, Loc
from rlhf.recipe.model_shape import ModelShape
from rlhf.recipe.online_schema import OnlineStage, PpoStage
from rlhf.recipe.role_schema import RoleName, TrainedRole
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_base import MARK, Training
from rlhf.recipe.stage_schema import RewardStage, Stage
from rlhf.recipe.tuned_sizes import FEED_FORWARD, KEYS_AND_VALUES, layer_numbers, named, targets
from rlhf.recipe.tuning_schema import AnyLora, Bitfit, Ia3, Layers, LlamaAdapter, Lora, PrefixTuning, Qlora, Tuning
from rlhf.recipe.tuning_support import methods, support

LLAMA = ("llama", "mistral")
"""Architectures whose attention PEFT's LLaMA-Adapter knows."""


def check_tuning(recipe: Recipe, users: Mapping[str, str]) -> Iterator[Finding]:
    """Yield where a method cannot be used; `users` maps the name of a stage to one that uses its model."""
    for index, stage in enumerate(recipe.stages):
        if not isinstance(stage, Training | OnlineStage):
            continue
        for key, role, tuning in _trained(recipe, stage):
            own = getattr(stage, key) is not None
            loc: Loc = ("stages", index, key) if own else ("tuning",)
            for problem in (*_result(stage, key, tuning, users), *_role(recipe, role, tuning)):
                yield (*loc, "kind"), problem if own else f"stage {stage.name}: {problem}"
    if recipe.roles.rollout.weights == "adapter":
        yield from _served(recipe)


def check_model(recipe: Recipe, shape: ModelShape) -> None:
    """Raise RecipeError where a method does not fit the model that the recipe starts from."""
    if recipe.checkpoints:
        return  # they may be other models; the roles find out
    for stage in recipe.stages:
        if not isinstance(stage, Training | OnlineStage):
            continue
        for key, _, tuning in _trained(recipe, stage):
            if problem := misfit(tuning, shape):
                own = getattr(stage, key) is not None
                where = f"stages.{stage.name.partition(MARK)[0]}.{key}" if own else "tuning"
                raise RecipeError(f"{where}: {tuning.kind}: {problem}")


def misfit(tuning: Tuning, shape: ModelShape) -> str:
    """Return why a method does not fit a model, in words; nothing where it does."""
    names = list(shape.linears)
    match tuning:
        case Bitfit() if not shape.biases:
            return "the model has no bias terms (Llama and Mistral have none, Qwen2 has some); use lora, ia3 or layers"
        case Ia3() if not all(_any(names, (name,)) for name in KEYS_AND_VALUES) or not _any(names, FEED_FORWARD):
            wanted = f"{', '.join(KEYS_AND_VALUES)} and {' or '.join(FEED_FORWARD)}"
            return f"the model has no linear layers named {wanted}; use lora"
        case Layers(last=last, indices=indices):
            asked = last if last is not None else len(set(indices or ()))
            return "" if len(layer_numbers(tuning, shape.layers)) == asked else f"the model has {shape.layers} layers"
        case LlamaAdapter() if shape.kind not in LLAMA:
            return f"it is for {' and '.join(LLAMA)} models, and this is {shape.kind}; use lora, ia3 or prefix_tuning"
        case LlamaAdapter() if (tuning.layers or 0) > shape.layers:
            return f"the model has {shape.layers} layers"
        case Lora(init="pissa") if tuning.r > min((min(size) for size in targets(shape, tuning)), default=tuning.r):
            return f"init: pissa takes {tuning.r} directions, more than a target layer is wide"
        case Lora() | Qlora() if not targets(shape, tuning):
            return f"target_modules: the model has no linear layers named {tuning.target_modules}"
    return ""


def _trained(recipe: Recipe, stage: Training | OnlineStage) -> Iterator[tuple[str, RoleName, Tuning]]:
    """Yield the key of each method of a stage, the role that it is for, and the method."""
    yield "tuning", "reward" if isinstance(stage, RewardStage) else "policy", stage.tuning or recipe.tuning
    if isinstance(stage, PpoStage):
        yield "critic_tuning", "critic", stage.critic_tuning or recipe.tuning


def _result(stage: Stage, key: str, tuning: Tuning, users: Mapping[str, str]) -> Iterator[str]:
    """Yield what the outcome of a stage is needed for and cannot be."""
    if key != "tuning" or support(tuning).merges:
        return
    able = methods(lambda method: method.merges)
    if isinstance(stage, OnlineStage):
        yield f"{tuning.kind} leaves no weights that the rollout engine could serve; those that do: {able}"
    elif stage.name in users:
        why = f"{tuning.kind} leaves an adapter and no model, and stage {users[stage.name]!r} uses the model"
        yield f"{why}; methods that leave one: {able}"
    elif isinstance(stage, RewardStage):
        why = f"{tuning.kind} leaves an adapter and no reward model that anything could score with"
        yield f"{why}; those that do: {able}"
    elif getattr(stage, "save_every", None):
        yield f"{tuning.kind} leaves no model that save_every could write; methods that do: {able}"


def _role(recipe: Recipe, name: RoleName, tuning: Tuning) -> Iterator[str]:
    """Yield what a role asks for that the method cannot do."""
    role = getattr(recipe.roles, name)
    assert isinstance(role, TrainedRole)
    if role.zero_stage == 3 and (role.ranks > 1 or role.offload == "parameters") and not support(tuning).cut:
        yield f"{tuning.kind} cannot be cut over ranks (roles.{name}.zero_stage: 3); use 1 or 2, or lora"
    if isinstance(tuning, PrefixTuning) and role.gradient_checkpointing:
        why = "its keys and values stand in a cache, which a layer that is computed again would fill twice"
        yield f"prefix_tuning has no gradient checkpointing (roles.{name}.gradient_checkpointing): {why}"
    here = recipe.backend == "local" or recipe.ray.address is None
    if isinstance(tuning, Qlora) and here and importlib.util.find_spec("bitsandbytes") is None:
        yield f"qlora needs bitsandbytes, which is not installed: {extra_command('qlora')}, or use lora"


def _served(recipe: Recipe) -> Iterator[Finding]:
    for stage in recipe.stages:
        tuning = getattr(stage, "tuning", None) or recipe.tuning
        if not isinstance(stage, OnlineStage) or support(tuning).served:
            continue
        if not support(tuning).adapter:
            why = f"stage {stage.name!r} trains weights of the model itself, so there is no adapter to send"
        else:
            how = "lora with dora or pissa" if isinstance(tuning, AnyLora) and tuning.kind == "lora" else tuning.kind
            why = (
                f"stage {stage.name!r} trains by {how}, which vLLM does not serve beside the base (plain lora it does)"
            )
        yield ("roles", "rollout", "weights"), f"{why}; use weights: merged"


def _any(names: list[str], ends: tuple[str, ...]) -> bool:
    return any(named(name, ends) for name in names)
