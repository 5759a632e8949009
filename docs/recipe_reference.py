"""Writes the page of all recipe keys from the schema: `python docs/recipe_reference.py`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.recipe import base, online_schema, preference_schema, role_schema, schema, stage_base, stage_schema
from rlhf.recipe import tuning_schema as tuning

PAGE = Path(__file__).parent / "pages" / "recipe.md"
HEAD = """\
# Recipe reference

Every key of a recipe, its type and its default. This page is made from the schema by `docs/recipe_reference.py`;
`rlhf schema` prints the same as JSON schema, for editors, and a run folder's `recipe.resolved.yaml` has every default
written out.

A recipe may begin with `extends: other.yaml`: its mappings are laid over the other's key by key, its stages by name.
Paths are relative to the file that they stand in. `--set stages.ppo.kl_coef=0.05` overrides any key on the command
line.
"""
SECTIONS: dict[str, tuple[type[BaseModel], ...]] = {
    "Top level": (schema.Recipe, schema.ModelSource, schema.Recovery, schema.Best, base.Budget),
    "Where it runs": (
        schema.Ray,
        role_schema.Roles,
        role_schema.Role,
        role_schema.ModelRole,
        role_schema.TrainedRole,
        role_schema.ReferenceRole,
        role_schema.RewardRole,
        role_schema.CriticRole,
        role_schema.RolloutRole,
    ),
    "Tracking": (schema.Tracking, schema.Wandb, schema.Trackio),
    "Tuning methods": tuple(get_args(get_args(tuning.Tuning)[0])),
    "Data": (base.PathData, base.HubData, base.StageData),
    "Judges": (base.FunctionJudge, base.ModelJudge, base.HttpJudge, base.LlmJudge),
    "Training in general": (stage_base.StageBase, stage_base.Training, base.Optimizer),
    "Stages that prepare": (
        stage_schema.SftStage,
        stage_schema.ClassifyStage,
        stage_schema.SynthesizeStage,
        stage_schema.AnnotateStage,
        stage_schema.RewardStage,
    ),
    "Stages that learn from preferences": (
        preference_schema.PreferenceStage,
        *get_args(preference_schema.AnyPreferenceStage),
    ),
    "Stages that learn from their own rollouts": (
        online_schema.OnlineStage,
        online_schema.PolicyGradientStage,
        online_schema.GroupStage,
        *get_args(online_schema.AnyOnlineStage),
        online_schema.Agreement,
        online_schema.Overlong,
        online_schema.SampleFiles,
    ),
    "Comparison": (stage_schema.CompareStage,),
}
NAMES: dict[type[BaseModel], str] = {
    schema.Recipe: "The recipe",
    schema.ModelSource: "`model`",
    schema.Recovery: "`recovery`",
    schema.Best: "`recovery.keep_best`",
    base.Budget: "`budget`",
    schema.Ray: "`ray`",
    role_schema.Roles: "`roles`",
    role_schema.Role: "Every role",
    role_schema.ModelRole: "Every role with a model",
    role_schema.TrainedRole: "`roles.policy`, and every role that may be trained",
    role_schema.ReferenceRole: "`roles.reference`",
    role_schema.RewardRole: "`roles.reward`",
    role_schema.CriticRole: "`roles.critic`",
    role_schema.RolloutRole: "`roles.rollout` and `roles.judge`",
    schema.Tracking: "`tracking`",
    schema.Wandb: "`tracking.wandb`",
    schema.Trackio: "`tracking.trackio`",
    base.PathData: "A file: `path`",
    base.HubData: "A dataset of the hub: `hub`",
    base.StageData: "An earlier stage: `stage`",
    stage_base.StageBase: "Every stage",
    stage_base.Training: "Every stage that trains on rows",
    base.Optimizer: "`optimizer`",
    preference_schema.PreferenceStage: "Every preference stage",
    online_schema.OnlineStage: "Every stage with rollouts",
    online_schema.PolicyGradientStage: "Every policy-gradient stage",
    online_schema.GroupStage: "GRPO and Dr. GRPO",
    online_schema.Agreement: "`agreement`",
    online_schema.Overlong: "`overlong`",
    online_schema.SampleFiles: "`samples`",
}
GROUPS: dict[tuple[str, str], tuple[type[BaseModel], ...]] = {
    ("Tuning methods", "a tuning method"): SECTIONS["Tuning methods"],
    ("Judges", "a judge"): SECTIONS["Judges"],
    ("Data", "data"): SECTIONS["Data"],
    ("Data", "a file or dataset"): (base.PathData, base.HubData),
    ("Stages that prepare", "a stage"): tuple(get_args(stage_schema.AnyStage)),
}
"""Unions that have a name of their own, by the section to look in."""


def page() -> str:
    """Return the page in Markdown."""
    parts = [HEAD]
    for title, models in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [_section(model) for model in models]
    return "\n".join(parts)


def documented() -> set[str]:
    """Return the names of all sections on the page, as the JSON schema calls them."""
    return {model.__name__ for models in SECTIONS.values() for model in models}


def _section(model: type[BaseModel]) -> str:
    above = [parent for parent in model.__mro__[1:] if parent.__name__ in documented()]
    inherited = f"\n\nAlso the keys of {_link(above[0])}." if above else ""
    lines = [
        f"### {_name(model)} {{#{model.__name__.lower()}}}",
        "",
        inspect.cleandoc(model.__doc__ or "") + inherited,
        "",
    ]
    rows = list(_rows(model, above[0] if above else None))
    if rows:
        lines += ["| key | type | default | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(line.rstrip() for line in lines)


def _rows(model: type[BaseModel], above: type[BaseModel] | None) -> Iterator[str]:
    """Yield a row for each key that the section has beyond the one above it, or has otherwise."""
    properties = _properties(model)
    known = _properties(above) if above else {}
    for name, field in model.model_fields.items():
        if name == "kind" or (name in known and properties[name] == known[name]):
            continue
        cells = (f"`{name}`", _type(properties[name]), _default(field), (field.description or "").replace("|", "\\|"))
        yield f"| {' | '.join(cells)} |"


def _properties(model: type[BaseModel]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = model.model_json_schema().get("properties", {})
    return found


def _name(model: type[BaseModel]) -> str:
    if model in NAMES:
        return NAMES[model]
    kind = model.model_fields.get("kind")
    return f"`kind: {get_args(kind.annotation)[0]}`" if kind else model.__name__


def _link(model: type[BaseModel]) -> str:
    name = _name(model)
    shown = name[0].lower() + name[1:] if name.startswith(("Every ", "A ", "An ")) else name
    return f"[{shown}](#{model.__name__.lower()})"


def _type(schema: Mapping[str, Any]) -> str:
    """Return the type of a key in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        models = {model.__name__: model for models in SECTIONS.values() for model in models}
        return _link(models[name])
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return _union([part for part in schema[union] if part.get("type") != "null"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "list of " + ", ".join(_type(part) for part in schema["prefixItems"])
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties") or next(iter(schema["patternProperties"].values()))
        return f"names, each with {_type(values)}"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    return words[schema["type"]] + _bounds(schema)


def _union(parts: list[Mapping[str, Any]]) -> str:
    """Return the members, or the section that has just these."""
    names = {part.get("$ref", "").rpartition("/")[2] for part in parts}
    for (title, said), members in GROUPS.items():
        if names == {model.__name__ for model in members}:
            return f"[{said}](#{title.lower().replace(' ', '-')})"
    return " or ".join(dict.fromkeys(_type(part) for part in parts))


def _bounds(schema: Mapping[str, Any]) -> str:
    signs = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    found = [f"{sign} {_yaml(schema[key])}" for key, sign in signs.items() if key in schema]
    return f" {' '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "none" if field.default_factory in (list, dict) else "unset"
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "unset"
    if isinstance(field.default, BaseModel):
        keys = field.default.model_dump(mode="json", exclude_unset=True)
        keys = {"kind": kind, **keys} if (kind := getattr(field.default, "kind", None)) else keys
        return f"`{{{', '.join(f'{key}: {_yaml(value)}' for key, value in keys.items())}}}`" if keys else "its defaults"
    return f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
