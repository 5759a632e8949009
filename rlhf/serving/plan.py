"""Which models one engine can serve together: one alone, or one with adapters that were trained from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import RecipeError
from rlhf.export.source import FinishedStage, NamedModel

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has room for (`vllm.config.lora.MaxLoRARanks`)."""


@dataclass(frozen=True)
class Serving:
    """An engine: the folder it loads and the name that answers for it; `adapters` are folders by name."""

    folder: Path
    name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    rank: int = 0

    @property
    def names(self) -> list[str]:
        """All names that requests can ask for."""
        return [self.name, *self.adapters]


def plan_serving(models: Sequence[NamedModel]) -> Serving:
    """Return how to serve all the models on one engine.

    One is served merged. Several share the model they were all trained from, each as its LoRA adapter, switched by the
    name in the request; that model answers too. Raises RecipeError where they have no such model in common, or vLLM
    cannot serve one's adapter.
    """
    if len(models) == 1:
        return Serving(models[0].folder, models[0].name)
    starts = {model.name: _start(model) for model in models}
    wanted = [model.folder.resolve() for model in models] + [start for start in starts.values() if start]
    for folder in wanted:
        rest = [model for model in models if model.folder.resolve() != folder]
        if all(starts[model.name] == folder for model in rest):
            return _shared(folder, models, rest)
    said = ", ".join(f"{model.name} {_origin(model)}" for model in models)
    raise RecipeError(
        f"these do not share an engine: {said}. Several are served as LoRA adapters of one model that all began with:"
        " serve one, or each with a --port of its own"
    )


def _shared(folder: Path, models: Sequence[NamedModel], rest: Sequence[NamedModel]) -> Serving:
    own = [model.name for model in models if model.folder.resolve() == folder]
    stages = {model.name: model.stage for model in rest if model.stage is not None}
    adapters = {name: stage.adapter for name, stage in stages.items() if stage.adapter is not None}
    rank = max(_rank(name, adapter) for name, adapter in adapters.items())
    name = own[0] if own else str(next(iter(stages.values())).parent)
    if name in adapters:
        raise RecipeError(f"{name} is the name of a stage and of what it began with; serve one of them")
    return Serving(folder, name, adapters, rank)


def _start(model: NamedModel) -> Path | None:
    """Return the folder of what a model's adapter was trained from, None for a model without an adapter."""
    return model.stage.start().resolve() if model.stage and model.stage.adapter else None


def _origin(model: NamedModel) -> str:
    if model.stage is None:
        return "comes from elsewhere"
    if model.stage.adapter is None:
        return "has no adapter"
    return f"began with {_parent(model.stage)}"


def _parent(stage: FinishedStage) -> str:
    return f"{stage.run.name}/{stage.parent}"


def _rank(name: str, adapter: Path) -> int:
    """Return the smallest rank of vLLM's that holds an adapter; RecipeError where it cannot serve it."""
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    init = config.get("init_lora_weights", True)
    odd = {
        f"an adapter of kind {config.get('peft_type')}": config.get("peft_type") != "LORA",
        "DoRA": bool(config.get("use_dora")),
        f"an adapter that began as {init}": isinstance(init, str) and init.lower() != "gaussian",
        "modules of its own": bool(config.get("modules_to_save")),
    }
    if wrong := [what for what, is_so in odd.items() if is_so]:
        raise RecipeError(f"{name}: vLLM cannot serve {wrong[0]} beside other models; serve it alone")
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1]:
        raise RecipeError(f"{name}: its adapter has rank {rank}, vLLM serves those up to {RANKS[-1]}; serve it alone")
    return next(one for one in RANKS if one >= rank)
