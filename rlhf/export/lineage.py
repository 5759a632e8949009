"""Where a finished stage comes from: every stage before it, the base model and its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import RecipeError
from rlhf.export.source import FinishedStage
from rlhf.models.gguf import locate_gguf

UNKNOWN = "unknown"
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
SETTINGS = (
    "epochs", "steps", "batch_size", "prompts_per_step", "samples_per_prompt", "minibatch_size", "count", "beta",
    "kl_coef", "clip_range", "label_smoothing", "label_noise", "pairing", "keep", "max_length", "max_response_tokens",
    "temperature",
)  # fmt: skip
"""What a card says of a stage, beside its tuning, optimizer, judge and data: numbers and names, no paths or URLs."""


@dataclass(frozen=True)
class Base:
    """The model that a run began with: a hub id where it has one, the licence where one is known."""

    name: str
    hub: bool
    revision: str | None
    licence: str | None


@dataclass(frozen=True)
class Step:
    """A stage on the way: what it was made from, its settings in words, and its data files with their sha256."""

    name: str
    kind: str
    made_from: tuple[str, ...]
    settings: tuple[str, ...]
    data: Mapping[str, str]
    changed: bool


def lineage(stage: FinishedStage) -> list[Step]:
    """Return the stages from the base to this one, in an order in which they could run.

    A stage that was made again since, and is not kept, is marked: it is no longer what this one was made from.
    """
    steps: dict[str, Step] = {}

    def visit(one: FinishedStage, key: str) -> None:
        for name, wanted in one.content["upstream"].items():
            if name not in steps and (made_from := one.upstream(name)) is not None:
                visit(made_from, wanted)
        steps[one.stage] = _step(one, changed=one.done["key"] != key)

    visit(stage, stage.done["key"])
    return list(steps.values())


def base_of(stage: FinishedStage) -> Base:
    """Return the model that the run of a stage began with; of a model on this machine no more than its name."""
    model = stage.base
    path, revision = str(model["path"]), model.get("revision")
    if path.startswith("gguf://"):
        name = path if not path.startswith("gguf:///") else path.rpartition("/")[2]
        return Base(name, False, None, _gguf_licence(path))
    if "://" in path:
        return Base(path, False, None, None)
    folder = Path(path).expanduser()
    if folder.is_dir() or not HUB_ID.fullmatch(path):
        return Base(folder.name if folder.is_dir() else path.rpartition("/")[2], False, None, _card_licence(folder))
    return Base(path, True, revision, _hub_licence(path, revision))


def parent_name(stage: FinishedStage) -> str:
    """Return a name for what a stage's adapter belongs on: a hub id, or that of an exported stage beside it."""
    parent = stage.parent or "base"
    if parent == "base":
        return base_of(stage).name
    if (made_from := stage.upstream(parent)) is not None:
        return made_from.title
    return str(parent)


def _step(stage: FinishedStage, changed: bool) -> Step:
    settings = stage.settings
    said = [f"{name} {settings[name]}" for name in SETTINGS if settings.get(name) is not None]
    seed = settings.get("seed")
    said.append(f"seed {stage.content.get('seed') if seed is None else seed}")
    if tuning := stage.tuning if "optimizer" in settings else None:
        said.insert(0, " ".join(["tuning", str(tuning.get("kind", "lora")), *_of(tuning, ("r", "alpha"))]))
    if optimizer := settings.get("optimizer"):
        said.insert(0, f"learning rate {optimizer.get('learning_rate')} ({optimizer.get('schedule')})")
    for name in ("judge", "reward", "gold"):
        if judge := settings.get(name):
            said.append(f"{name}: {_judge(judge)}")
    data = {name: digest for name, digests in stage.content.get("files", {}).items() for digest in digests}
    for name in ("data", "prompts", "seeds"):
        if hub := (settings.get(name) or {}).get("hub"):
            data[f"{hub} ({settings[name].get('split')})"] = settings[name].get("revision") or "no revision given"
    return Step(stage.stage, stage.kind, tuple(stage.content["upstream"]), tuple(said), data, changed)


def _of(section: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [f"{name} {section[name]}" for name in names if section.get(name) is not None]


def _judge(judge: Mapping[str, Any]) -> str:
    """Say who judged; where a service is, and what it is asked with, stays here."""
    if judge["kind"] == "function":
        return f"function {Path(judge['path']).name}"
    return f"{judge['kind']} {judge['stage']}" if judge["kind"] == "model" else f"{judge['kind']} endpoint"


def _gguf_licence(path: str) -> str | None:
    from gguf import GGUFReader

    try:
        field = GGUFReader(locate_gguf(path)).fields.get("general.license")
    except (RecipeError, OSError, ValueError):
        return None
    return str(field.contents()) if field else None


def _card_licence(folder: Path) -> str | None:
    """Return what the model card in a folder says; None without one."""
    from huggingface_hub import ModelCard

    try:
        return ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError, TypeError):
        return None


def _hub_licence(repo: str, revision: str | None) -> str | None:
    """Return what the model card says that the hub's cache has on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, "README.md", revision=revision)
    return _card_licence(Path(found).parent) if isinstance(found, str) else None
