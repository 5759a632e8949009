"""Paths inside a recipe, made absolute from the file in which they stand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from rlhf.recipe.base import FunctionJudge, LlmJudge, PathData
from rlhf.recipe.messages import Loc, Problem
from rlhf.recipe.schema import ModelSource, Recipe
from rlhf.recipe.source import Node

Section = TypeVar("Section", bound=BaseModel)
LOCAL = ("./", "../", "/", "~/")


def resolve_paths(recipe: Recipe, root: Node, folder: Path) -> tuple[Recipe, list[Problem]]:
    """Return the recipe with absolute paths, and a problem for each file that does not exist.

    A path is relative to the file it was written in (a base recipe, say), `--set` and defaults to `folder`.
    Hub ids and `scheme://` models stay as they are.
    """
    resolver = _Resolver(root, folder)
    resolved = resolver.section(recipe, ())
    return resolved, resolver.problems


class _Resolver:
    def __init__(self, root: Node, folder: Path) -> None:
        self.root = root
        self.folder = folder
        self.problems: list[Problem] = []

    def section(self, section: Section, loc: Loc) -> Section:
        """Return a copy of the section with its paths, and those of the sections inside it, absolute."""
        changes: dict[str, Any] = {}
        for name in type(section).model_fields:
            value = getattr(section, name)
            if isinstance(value, BaseModel):
                changes[name] = self.section(value, (*loc, name))
            elif isinstance(value, list):
                changes[name] = [
                    self.section(item, (*loc, name, index)) if isinstance(item, BaseModel) else item
                    for index, item in enumerate(value)
                ]
        match section:
            case PathData():
                changes["path"] = self.file(section.path, (*loc, "path"))
            case FunctionJudge():
                file, _, function = section.path.rpartition(":")
                changes["path"] = f"{self.file(Path(file), (*loc, 'path'))}:{function}"
            case LlmJudge() if section.url is None:
                changes["model"] = self.model(section.model, (*loc, "model"))
            case Recipe():
                changes["checkpoints"] = {
                    name: self.model(path, (*loc, "checkpoints", name)) for name, path in section.checkpoints.items()
                }
            case ModelSource():
                changes["path"] = self.model(section.path, (*loc, "path"))
                if section.chat_template:
                    changes["chat_template"] = self.file(section.chat_template, (*loc, "chat_template"))
        return section.model_copy(update=changes)

    def file(self, path: Path, loc: Loc) -> Path:
        absolute = self.absolute(path, loc)
        if not os.path.isfile(absolute):
            problem = f"a folder, not a file: {path}" if os.path.isdir(absolute) else f"file not found: {path}"
            self.problems.append(Problem(loc, problem))
        return absolute

    def model(self, path: str, loc: Loc) -> str:
        if "://" in path:
            return path
        absolute = self.absolute(Path(path), loc)
        if os.path.exists(absolute):
            return str(absolute)
        if path.startswith(LOCAL):
            self.problems.append(Problem(loc, f"folder not found: {path}"))
        return path

    def absolute(self, path: Path, loc: Loc) -> Path:
        node, _ = self.root.nearest(loc)
        folder = node.mark.file.parent if node.mark.file else self.folder
        home = path.expanduser() if path.parts[:1] == ("~",) else path
        return Path(os.path.abspath(folder / home))
