"""Recipe text as a tree of values that remember where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import CollectionNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.scalarbool import ScalarBoolean
from ruamel.yaml.scanner import RoundTripScanner

from rlhf.errors import RecipeError

MAX_BYTES = 128 << 10
MAX_VALUES = 10_000
MAX_DEPTH = 50
DEEP = f"nested deeper than {MAX_DEPTH} levels"
PLAIN_ONLY = "only text, numbers, true, false and null are allowed; quote this value"

Value: TypeAlias = "dict[str, Node] | list[Node] | str | int | float | bool | None"


@dataclass(frozen=True)
class Mark:
    """A place in a file, counted from 1; `file` None is the command line's `--set`."""

    file: Path | None
    line: int = 1
    column: int = 1

    def at(self, name: str) -> str:
        """Return the start of an error line about the value called `name`."""
        if self.file is None:
            return f"--set {name}: "
        place = f"{self.file}:{self.line}:{self.column}: "
        return f"{place}{name}: " if name else place


@dataclass(frozen=True)
class Node:
    """A value, where it stands (`mark`) and where its key stands (`key`; the same for list items)."""

    value: Value
    mark: Mark
    key: Mark

    def plain(self) -> Any:
        """Return the value without positions."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def child(self, step: str | int) -> Node | None:
        """Return the value under a key or index, or None."""
        if isinstance(self.value, dict) and isinstance(step, str):
            return self.value.get(step)
        if isinstance(self.value, list) and isinstance(step, int) and step < len(self.value):
            return self.value[step]
        return None

    def nearest(self, path: Sequence[str | int]) -> tuple[Node, bool]:
        """Return the deepest existing node along `path`, and whether that is the path's end."""
        node = self
        for step in path:
            child = node.child(step)
            if child is None:
                return node, False
            node = child
        return node, True

    def with_child(self, step: str | int, child: Node) -> Node:
        """Return a copy in which `child` stands under an existing index or any key."""
        if isinstance(self.value, list) and isinstance(step, int):
            items = [child if index == step else item for index, item in enumerate(self.value)]
            return Node(items, self.mark, self.key)
        assert isinstance(self.value, dict)
        assert isinstance(step, str)
        return Node({**self.value, step: child}, self.mark, self.key)


def read_text(path: Path) -> str:
    """Return a recipe file's text; RecipeError when it is missing, too large or not UTF-8."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: recipe not found") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            f"{path}: larger than {MAX_BYTES // 1024} KiB; recipes name data files, they do not hold data"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise RecipeError(f"{path}:{line}:{column}: not UTF-8 text (byte 0x{raw[error.start]:02x})") from None


def parse(text: str, file: Path | None) -> Node:
    """Parse YAML 1.2 text; RecipeError with the position for bad syntax, duplicate keys or too many values."""
    yaml = YAML(typ="rt", pure=True)
    yaml.Scanner = _PlainScanner
    yaml.Composer = _PlainComposer
    try:
        return _Converter(file).node(yaml.load(text), Mark(file), Mark(file), 0)
    except MarkedYAMLError as error:
        where = error.problem_mark or error.context_mark
        mark = Mark(file, where.line + 1, where.column + 1) if where else Mark(file)
        problem = str(error.problem or error.context).split(" with value")[0]
        said = problem if isinstance(error, _Refused) else f"not valid YAML: {problem}"
        said += "; indent with spaces" if r"character '\t'" in said else ""
        raise RecipeError(f"{_place(mark)}{said}") from None
    except ReaderError as error:
        before = text[: error.position]
        mark = Mark(file, before.count("\n") + 1, error.position - before.rfind("\n"))
        raise RecipeError(f"{_place(mark)}not valid YAML: character U+{ord(text[error.position]):04X}") from None
    except (YAMLError, ValueError) as error:
        raise RecipeError(f"{_place(Mark(file))}not valid YAML: {str(error).splitlines()[0]}") from None


def _place(mark: Mark) -> str:
    return mark.at("") if mark.file else ""


class _Refused(MarkedYAMLError):
    """YAML that is valid and that no recipe needs."""


class _PlainScanner(RoundTripScanner):
    """Refuses directives, which change what the rest of a file means, and what it would take very long to scan."""

    def fetch_flow_collection_start(self, kind: type, to_push: str) -> None:
        if len(self.flow_context) >= MAX_DEPTH - 1:  # it looks far ahead of the composer
            raise _Refused(None, None, DEEP, self.reader.get_mark())
        super().fetch_flow_collection_start(kind, to_push)

    def fetch_directive(self) -> None:
        raise _Refused(None, None, "a recipe needs no % directives", self.reader.get_mark())


class _PlainComposer(Composer):
    """Refuses, while the tree is built, what only costs time or runs code: depth, tags, rings, repeated aliases."""

    def __init__(self, loader: object = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False
        self.values = 0
        self.sizes: dict[str, int] = {}

    def compose_node(self, parent: object, index: object) -> object:
        event = self.parser.peek_event()
        before = self.values
        self.values += 1
        if isinstance(event, AliasEvent):
            anchored = self.anchors.get(event.anchor)
            self.values += self.sizes.get(event.anchor, 0)
            if isinstance(anchored, CollectionNode) and anchored.end_mark is None:
                raise _Refused(None, None, f"*{event.anchor} stands inside of what it repeats", event.start_mark)
        elif self.depth >= MAX_DEPTH:
            raise _Refused(None, None, DEEP, event.start_mark)
        elif event.ctag is not None:
            raise _Refused(None, None, PLAIN_ONLY, event.start_mark)
        if self.values > MAX_VALUES:
            raise _Refused(None, None, f"with its aliases more than {MAX_VALUES} keys and values", event.start_mark)
        node = super().compose_node(parent, index)
        if event.anchor is not None and not isinstance(event, AliasEvent):
            self.sizes[event.anchor] = self.values - before
        return node


class _Converter:
    """Turns ruamel's round-trip objects into nodes."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def node(self, value: object, mark: Mark, key: Mark, depth: int) -> Node:
        if depth > MAX_DEPTH:  # an alias of an alias of an alias
            raise RecipeError(f"{_place(key)}{DEEP}")
        if isinstance(value, CommentedMap):
            return Node({str(k): self.entry(value, k, mark, depth) for k in value}, mark, key)
        if isinstance(value, list):
            places = value.lc.data or {}  # type: ignore[attr-defined]
            marks = [self.mark_at(places[index]) if index in places else mark for index in range(len(value))]
            items = [self.node(item, at, at, depth + 1) for item, at in zip(value, marks, strict=True)]
            return Node(items, mark, key)
        return Node(_scalar(value, mark), mark, key)

    def entry(self, parent: CommentedMap, name: object, mark: Mark, depth: int) -> Node:
        place = _key_place(parent, name)
        key, at = (self.mark_at(place[:2]), self.mark_at(place[2:])) if place else (mark, mark)
        if not isinstance(name, str):
            raise RecipeError(f"{_place(key)}keys must be text, got {name!r}")
        value = parent[name]
        # ruamel places the missing value of `key:` at whatever comes next.
        return self.node(value, key if value is None and at.line != key.line else at, key, depth + 1)

    def mark_at(self, place: Sequence[int]) -> Mark:
        return Mark(self.file, place[0] + 1, place[1] + 1)


def _key_place(parent: Mapping[Any, Any], name: object) -> Sequence[int] | None:
    """Return ruamel's (key line, key column, value line, value column), through `<<` merges."""
    if not isinstance(parent, CommentedMap):
        return None
    place = (parent.lc.data or {}).get(name)
    sources = (source for source in parent.merge if name in source)
    return place or next((_key_place(source, name) for source in sources), None)


def _scalar(value: object, mark: Mark) -> str | int | float | bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, ScalarBoolean):
        return bool(value)
    if isinstance(value, float | int) and not abs(value) < 2**63:
        raise RecipeError(f"{_place(mark)}numbers must be finite and below 2**63")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise RecipeError(f"{_place(mark)}half of a surrogate pair is no character")
    if isinstance(value, str) and "\0" in value:
        raise RecipeError(f"{_place(mark)}text must not hold the character U+0000")
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise RecipeError(f"{_place(mark)}{PLAIN_ONLY}")
