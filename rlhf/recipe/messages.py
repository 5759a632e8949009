"""What is wrong in a recipe, in plain words and at its place in the file."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from rlhf.recipe.schema import FILE_NAME, Recipe
from rlhf.recipe.source import Node
from rlhf.recipe.stage_base import NAME
from rlhf.recipe.stage_schema import Stage

Loc = tuple[str | int, ...]
Finding = tuple[Loc, str]
MAX_LINES = 6

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
}

RENAMED: dict[str | int, str] = {"lora": "tuning", "critic_lora": "critic_tuning"}
"""Keys of earlier versions, and what they are called now."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe; `about` says whether it is the value at `loc`, its key or its absence."""

    loc: Loc
    text: str
    about: Literal["value", "key", "absence"] = "value"


def render(problems: Iterable[Problem], root: Node) -> str:
    """Return one line per problem in the order of the file, at most six."""
    found: dict[tuple[str, int, int, str], str] = {}
    for problem in problems:
        node, exists = root.nearest(problem.loc)
        mark = node.mark if exists and problem.about == "value" else node.key
        place = (str(mark.file), mark.line, mark.column, problem.text if mark.file else dotted(problem.loc, root))
        found.setdefault(place, mark.at(dotted(problem.loc, root)) + problem.text)  # aliases repeat what they name
    lines = [re.sub(r"[\x00-\x1f\x7f]+", " ", found[place]) for place in sorted(found)]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"and {len(lines) - MAX_LINES + 1} more"]
    return "\n".join(lines)


def dotted(loc: Loc, root: Node) -> str:
    """Return `stages.ppo.clip_range` for ("stages", 3, "clip_range"): stages go by name, other items by number."""
    text = ""
    node: Node | None = root
    for depth, step in enumerate(loc):
        node = node.child(step) if node else None
        name = node.child("name") if node and depth == 1 and loc[0] == "stages" else None
        if name and isinstance(name.value, str):
            text += f".{name.value}"
        elif isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text


def near(word: str, choices: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` with the closest choice, or nothing."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def explain(errors: Sequence[ErrorDetails]) -> list[Problem]:
    """Translate pydantic's errors, without the noise of unions: their tags, and the members that were not meant."""
    placed = [(_place(error["loc"][:-1] if _is_key(error) else error["loc"]), error) for error in errors]
    inner = {place.loc[:end] for place, _ in placed for end in range(len(place.loc))}
    groups: dict[Loc, list[tuple[_Place, ErrorDetails]]] = {}
    for place, error in placed:
        if not (place.in_union and place.loc in inner):
            groups.setdefault(place.loc, []).append((place, error))
    return [_problem(group) for group in groups.values()]


@dataclass(frozen=True)
class _Place:
    """A pydantic location without union tags; `keys` could stand at its last step, which `field` declares."""

    loc: Loc
    keys: tuple[str, ...]
    field: FieldInfo | None
    in_union: bool


def _place(loc: Loc) -> _Place:
    clean: list[str | int] = []
    options: list[Any] = [Recipe]
    keys: tuple[str, ...] = ()
    others: tuple[str, ...] = ("extends",)
    field: FieldInfo | None = None
    tagged = False
    for step in loc:
        tagged = len(options) > 1
        if tagged:
            others = _tags(options)
            options = [next((option for option in options if step in _labels(option)), object)]
        else:
            owner = _bare(options[0])
            keys, others = (*getattr(owner, "model_fields", ()), *others), ()
            field, options = _descend(owner, step)
            clean.append(step)
    return _Place(tuple(clean), keys, field, tagged)


def _descend(kind: Any, step: str | int) -> tuple[FieldInfo | None, list[Any]]:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        field = kind.model_fields.get(str(step))
        return field, _members(field.annotation) if field else [object]
    inner = get_args(kind)
    return None, _members(inner[-1]) if inner else [object]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> list[Any]:
    bare = _bare(annotation)
    if get_origin(bare) in (Union, types.UnionType):
        return [member for part in get_args(bare) if part is not type(None) for member in _members(part)]
    return [annotation]


def _tags(options: Iterable[Any]) -> tuple[str, ...]:
    """Return the keys of which one says what member of a union is meant, where it is not `kind` that does."""
    return tuple(item.tag for option in options for item in get_args(option)[1:] if isinstance(item, Tag))


def _labels(option: Any) -> set[str]:
    """Return the names by which pydantic may call a member of a union in a location."""
    bare = _bare(option)
    labels = set(_tags([option]))
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        kind = bare.model_fields.get("kind")
        return labels | {bare.__name__} | (set(get_args(kind.annotation)) if kind else set())
    return labels | {str(bare)}


def _problem(group: Sequence[tuple[_Place, ErrorDetails]]) -> Problem:
    place, error = group[0]
    loc, context = place.loc, error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden" if loc[-1] in RENAMED:
            method = "full" if error["input"] == "full" else "lora, r: 8"
            return Problem(loc, f"unknown key (write {RENAMED[loc[-1]]}: {{kind: {method}}})", "key")
        case "extra_forbidden":
            return Problem(loc, "unknown key" + near(str(loc[-1]), place.keys), "key")
        case "missing":
            return Problem(loc, "required but missing", "absence")
        case "union_tag_not_found":
            if misspelt := difflib.get_close_matches("kind", _unknown(error["input"], place.field), n=1):
                return Problem((*loc, misspelt[0]), "unknown key (did you mean kind?)", "key")
            return Problem((*loc, "kind"), "required but missing", "absence")
        case "union_tag_invalid" if context["discriminator"] == "'kind'":
            choices = context["expected_tags"]
            hint = near(context["tag"], re.findall(r"'(.*?)'", choices))
            return Problem((*loc, "kind"), f"must be one of {choices}, got {context['tag']!r}{hint}")
        case "union_tag_invalid":
            return Problem((*loc, context["tag"]), f"not possible here, use one of {context['expected_tags']}", "key")
    wanted = " or ".join(_expected(error, place.field) for place, error in group)
    hint = near(error["input"], re.findall(r"'(.*?)'", wanted)) if isinstance(error["input"], str) else ""
    if _names_kind(error, place.field):
        hint = f" (write {{kind: {error['input']}}})"
    about: Literal["key", "value"] = "key" if _is_key(error) else "value"
    return Problem(loc, f"must be {wanted}, got {_shown(error['input'])}{hint}", about)


def _is_key(error: ErrorDetails) -> bool:
    """Return whether the key itself is wrong, of a mapping whose keys are free."""
    return error["loc"][-1:] == ("[key]",)


def _names_kind(error: ErrorDetails, field: FieldInfo | None) -> bool:
    """Return whether a section that has kinds is written as the bare name of one of them."""
    if field is None or error["type"] != "dict_type":
        return False
    sections = [kind for kind in _members(field.annotation) if "kind" in getattr(_bare(kind), "model_fields", ())]
    return isinstance(error["input"], str) and any(error["input"] in _labels(kind) for kind in sections)


def _unknown(section: object, field: FieldInfo | None) -> list[str]:
    """Return the keys of a section without a kind that are of no kind."""
    kinds = _members(field.annotation) if field else _members(Stage)
    known = {name for kind in kinds for name in _bare(kind).model_fields}
    return [key for key in section if key not in known] if isinstance(section, dict) else []


def _expected(error: ErrorDetails, field: FieldInfo | None) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "string_pattern_mismatch" if context["pattern"] == NAME:
            return "lower-case letters, digits, - and _, starting with a letter"
        case "string_pattern_mismatch" if context["pattern"] == FILE_NAME:
            return "letters, digits, '.', '_' and '-', starting with a letter or digit"
        case "string_pattern_mismatch":
            return field.description if field and field.description else f"text that matches {context['pattern']}"
        case "too_short":
            return f"a list of {context['min_length']} or more"
        case "too_long":
            return f"a list of at most {context['max_length']}"
    return EXPECTED.get(error["type"], error["msg"].removeprefix("Input should be "))


def _shown(value: object) -> str:
    if value is PydanticUndefined:
        return "nothing"
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
