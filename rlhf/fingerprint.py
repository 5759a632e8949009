"""Content keys of stages: a stage is done when nothing that could change its result has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf.recipe.base import FunctionJudge, StageData
from rlhf.recipe.online_schema import OnlineStage
from rlhf.recipe.preference_schema import PreferenceStage
from rlhf.recipe.resources import wanted
from rlhf.recipe.schema import Recipe
from rlhf.recipe.stage_schema import Stage, upstream

SHAPE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
WITHOUT_RESULT = {"max_tokens_per_microbatch", "samples"}
"""Settings of a stage that do not bear on its result."""
JUDGES = ("judge", "gold", "reward")
PACE = {"timeout_s", "load_timeout_s", "deadline_s", "workers", "concurrency"}
"""Settings of a judge that say how fast it must be or may be asked, not what it answers."""
SUFFIXES = (".safetensors", ".json", ".jinja", ".model")
RESULTS = {
    "sft": 1, "classify": 1, "annotate": 1, "synthesize": 1, "reward": 1, "compare": 2,
    "dpo": 1, "robust_dpo": 1, "ipo": 1, "hinge": 1, "simpo": 1, "orpo": 1, "kto": 1,
    "ppo": 2, "grpo": 1, "dr_grpo": 1, "rloo": 1, "reinforce_pp": 1, "online_dpo": 1,
}  # fmt: skip
"""A number for each kind of stage, part of its key.

Raise it when the same settings, data and upstream stages give other results than before, beyond rounding: another loss
or estimate, another order or seed, another rendering of text, another default of a setting. Then finished stages of
that kind, and all that follow from them, are made again. A faster way to the same result, a new setting whose default
is how it was, or a new version leave it alone.
"""

VERSION = "version"
"""What stood in contents before `RESULTS`; it is not compared."""


def stage_content(
    stage: Stage, recipe: Recipe, keys: Mapping[str, str], exclude_defaults: bool = False
) -> dict[str, Any]:
    """Return all that a stage's result depends on: settings, files, upstream keys, and what of the recipe bears on it.

    Files are told by their names and digests, wherever they are. `exclude_defaults` leaves out the settings that stand
    at their defaults, for `completed`.
    """
    files = sorted(_files(stage))
    dumped = stage.model_dump(mode="json", exclude=WITHOUT_RESULT, exclude_defaults=exclude_defaults)
    settings = json.dumps(dumped, sort_keys=True)
    for file in files:
        settings = settings.replace(json.dumps(str(file))[1:-1], json.dumps(file.name)[1:-1])
    budget = recipe.budget if _is_limited(stage) else None
    return {
        "results": RESULTS[stage.kind],
        "seed": recipe.seed,  # a stage's own is among its settings
        "budget": budget.model_dump(exclude_defaults=exclude_defaults) if budget else None,
        "dtype": recipe.model.precision,
        "tuning": recipe.tuning.model_dump(mode="json", exclude_defaults=exclude_defaults),
        "engine": recipe.roles.rollout.engine if "rollout" in wanted(recipe, stage) else None,
        "judging": recipe.roles.judge.engine if "judge" in wanted(recipe, stage) else None,
        "stage": _without_pace(json.loads(settings)),
        "files": {path.name: [file_digest(other) for other in files if other.name == path.name] for path in files},
        "upstream": {name: keys[name] for name in sorted(upstream(stage))},
    }


def content_key(content: Mapping[str, Any]) -> str:
    """Return the key of a stage's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def completed(old: Mapping[str, Any], new: Mapping[str, Any], without_defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content that a stage was made of, perhaps by another version, in the terms of this one.

    `new` is what the stage has now, and `without_defaults` the same without the settings at their defaults: a setting
    that `old` does not know, because it is younger, stood at its default. The stage is as wanted when the result
    equals `new`.
    """
    known = {name: value for name, value in old.items() if name != VERSION}
    if isinstance(known.get("stage"), Mapping):
        known["stage"] = _without_pace(known["stage"])
    filled: dict[str, Any] = _filled({"results": 1} | known, new, without_defaults)
    return filled


def _without_pace(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's settings without those of its judges that bear on their pace alone."""
    return {
        name: {key: given for key, given in value.items() if key not in PACE}
        if name in JUDGES and isinstance(value, Mapping)
        else value
        for name, value in settings.items()
    }


def _filled(old: Any, new: Any, without_defaults: Any) -> Any:
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return old
    given = without_defaults if isinstance(without_defaults, Mapping) else {}
    kept = {name: _filled(value, new.get(name), given.get(name)) for name, value in old.items()}
    return kept | {name: value for name, value in new.items() if name not in old and name not in given}


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> list[str]:
    """Return what differs between two contents in words, such as `kl_coef 0.05 -> 0.1`, in the order of the names."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        where = f"{place}.{name}" if place else name
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, "" if where == "stage" else where)
        elif where.startswith(("files.", "upstream.")):
            found.append(f"{where.partition('.')[2]} changed")
        else:
            found.append(f"{where} {json.dumps(before)} -> {json.dumps(after)}")
    return found


def _is_limited(stage: Stage) -> bool:
    return isinstance(stage, OnlineStage | PreferenceStage)


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """Return the sha256 over a model folder's weights, settings and tokenizer."""
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    return hashlib.sha256("".join(file.name + file_digest(file) for file in files).encode()).hexdigest()


def architecture_digest(folder: Path) -> str:
    """Return what two model folders must have in common for one rollout engine to serve both: shape and vocabulary."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = folder / "tokenizer.json"
    words = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
    content = [[config.get(key) for key in SHAPE], words.get("model", {}).get("vocab"), words.get("added_tokens")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files(section: BaseModel) -> Iterator[Path]:
    """Yield the data files and reward functions that a section names."""
    values: list[Any] = [getattr(section, name) for name in type(section).model_fields]
    for value in values:
        if isinstance(value, Path):
            yield value
        elif isinstance(value, FunctionJudge):
            yield Path(value.path.rpartition(":")[0])
        elif isinstance(value, BaseModel) and not isinstance(value, StageData):
            yield from _files(value)
