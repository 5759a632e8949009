"""From a YAML file to a checked `Recipe`: `extends`, `--set`, validation, paths and references."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from ruamel.yaml import YAML

from rlhf.errors import RecipeError
from rlhf.recipe.check import check_references
from rlhf.recipe.messages import Problem, explain, near, render
from rlhf.recipe.paths import resolve_paths
from rlhf.recipe.schema import Recipe
from rlhf.recipe.source import Mark, Node, parse, read_text

COMMAND_LINE = Mark(None)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe with absolute paths, and the file it came from; `text` is that file without its base.

    `root` is what was written, with its base and `overrides` (those of `--set`): paths as they stand there.
    """

    recipe: Recipe
    path: Path
    text: str
    folder: Path
    root: Node
    overrides: tuple[str, ...]

    def located(self, message: str) -> str:
        """Return a message that starts with a key, such as `model.path: `, with the key's place in the file before."""
        node = self.root
        for step in message.partition(": ")[0].split("."):
            index = _stage_index(node.value, step) if isinstance(node.value, list) else None
            child = node.child(step if index is None else index)
            if child is None:
                return message
            node = child
        return node.mark.at("") + message if node.mark.file else message


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, merge, validate and resolve a recipe.

    `overrides` are `key.path=value` with the value in YAML and stages addressed by name; their file paths are
    relative to the recipe, like those inside it. Raises RecipeError: one line per problem, with its position.
    """
    text = read_text(path)
    root = _with_base(parse(text, path), path, (path.resolve(),))
    for override in overrides:
        root = _override(root, override)
    folder = path.absolute().parent
    return LoadedRecipe(_validated(root, folder), path.absolute(), text, folder, root, tuple(overrides))


def resolved_yaml(recipe: Recipe) -> str:
    """Return the recipe with every default written out; loading that text gives an equal recipe."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.allow_unicode = True
    out = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), out)
    return out.getvalue()


def _validated(root: Node, folder: Path) -> Recipe:
    try:
        recipe = Recipe.model_validate_json(json.dumps(root.plain()), strict=True)
    except ValidationError as error:
        raise RecipeError(render(explain(error.errors(include_url=False)), root)) from None
    resolved, problems = resolve_paths(recipe, root, folder)
    problems += [Problem(loc, text) for loc, text in check_references(recipe)]
    if problems:
        raise RecipeError(render(problems, root))
    return resolved


def _with_base(root: Node, path: Path, chain: tuple[Path, ...]) -> Node:
    if root.value is None:
        raise RecipeError(f"{path}:1:1: the recipe is empty")
    if not isinstance(root.value, dict):
        raise RecipeError(f"{path}:1:1: a recipe must be a mapping of keys")
    extends = root.value.get("extends")
    if extends is None:
        return root
    where = extends.mark.at("extends")
    if not isinstance(extends.value, str):
        raise RecipeError(f"{where}must be the name of one recipe file, got {extends.plain()!r}")
    base_path = path.parent / extends.value
    if base_path.resolve() in chain:
        raise RecipeError(f"{where}{extends.value} extends this recipe again, a cycle")
    if not base_path.is_file():
        raise RecipeError(f"{where}file not found: {extends.value}")
    base = _with_base(parse(read_text(base_path), base_path), base_path, (*chain, base_path.resolve()))
    own = {key: node for key, node in root.value.items() if key != "extends"}
    return _merged(base, Node(own, root.mark, root.key), ())


def _merged(base: Node, own: Node, loc: tuple[str, ...]) -> Node:
    """Return `own` over `base`: mappings key by key, stages by name, all else replaced."""
    if loc == ("stages",) and isinstance(base.value, list) and isinstance(own.value, list):
        return Node(_merged_stages(base.value, own.value), own.mark, own.key)
    if not isinstance(base.value, dict) or not isinstance(own.value, dict) or _other_member(base.value, own.value):
        return own
    merged = dict(base.value)
    for key, node in own.value.items():
        merged[key] = _merged(merged[key], node, (*loc, key)) if key in merged else node
    return Node(merged, own.mark, own.key)


def _merged_stages(base: Sequence[Node], own: Sequence[Node]) -> list[Node]:
    stages = list(base)
    for stage in own:
        index = _stage_index(base, _name(stage))
        if index is None:
            stages.append(stage)
        else:
            stages[index] = _merged(base[index], stage, ("stages", "*"))
    return stages


def _other_member(base: dict[str, Node], own: dict[str, Node]) -> bool:
    """Say whether `own` is another member of a union than `base` (another kind, or path instead of hub)."""
    if "kind" in base and "kind" in own:
        return base["kind"].value != own["kind"].value
    sources = {"path", "hub", "stage"}
    return bool(sources & own.keys()) and bool(sources & base.keys()) and not sources & own.keys() & base.keys()


def _name(stage: Node) -> object:
    name = stage.child("name")
    return name.value if name else None


def _stage_index(stages: Sequence[Node], name: object) -> int | None:
    return next((i for i, stage in enumerate(stages) if name is not None and _name(stage) == name), None)


def _override(root: Node, override: str) -> Node:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {override}: must look like stages.ppo.kl_coef=0.05")
    try:
        value = _on_command_line(parse(text, None))
    except RecipeError as error:
        raise RecipeError(f"--set {name}: {error}") from None
    return _replaced(root, keys, value, name)


def _on_command_line(node: Node) -> Node:
    """Return the value with the command line as its position throughout."""
    if isinstance(node.value, dict):
        return Node({key: _on_command_line(item) for key, item in node.value.items()}, COMMAND_LINE, COMMAND_LINE)
    if isinstance(node.value, list):
        return Node([_on_command_line(item) for item in node.value], COMMAND_LINE, COMMAND_LINE)
    return Node(node.value, COMMAND_LINE, COMMAND_LINE)


def _replaced(node: Node, keys: Sequence[str], value: Node, name: str) -> Node:
    """Return `node` with `value` at `keys`; sections on the way are made where the recipe leaves them out."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(node.value, list):
        index = _stage_index(node.value, key)
        if index is None:
            names = [str(_name(item)) for item in node.value if _name(item) is not None]
            known = f"no stage is named {key!r}{near(key, names)}" if names else "a list is set as a whole: [a, b]"
            raise RecipeError(f"--set {name}: {known}")
        return node.with_child(index, _replaced(node.value[index], rest, value, name))
    if not isinstance(node.value, dict):
        raise RecipeError(f"--set {name}: {key!r} cannot be set inside the value {node.value!r}")
    child = node.value.get(key, Node({}, COMMAND_LINE, COMMAND_LINE))
    return node.with_child(key, _replaced(child, rest, value, name))
