"""The files that a recipe needs elsewhere: itself, what it extends, data, chat template and reward functions."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from rlhf.errors import RecipeError
from rlhf.recipe.base import FunctionJudge, LlmJudge, PathData
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.messages import Loc
from rlhf.recipe.schema import ModelSource, Recipe
from rlhf.recipe.source import Node, parse, read_text

EPOCH = (1980, 1, 1, 0, 0, 0)
SHOWN_LARGEST = 3
SECRET_FILE = re.compile(
    r"\.env(\..*)?|\.netrc|\.pgpass|\.npmrc|\.pypirc|\.git-credentials|auth_token|credentials(\..*)?|id_(rsa|dsa|ecdsa|ed25519)"
    r"|.*\.(pem|key|p12|pfx|keytab|kdbx|jks)",
    re.IGNORECASE,
)
SECRET_FOLDERS = {".ssh", ".aws", ".gnupg", ".kube", ".azure", ".docker"}


@dataclass(frozen=True)
class Upload:
    """Files by their names in an archive, in which they lie to each other as they do here.

    `overrides` are for `--set` there: those of the command line; paths that are given absolute, as they lie elsewhere
    in the archive; and the cluster itself. `models` are local model folders, which do not travel.
    """

    recipe: str
    files: dict[str, Path]
    overrides: tuple[str, ...]
    models: tuple[str, ...]

    @property
    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(file.stat().st_size for file in self.files.values())

    def describe(self) -> list[str]:
        """Return every file that is uploaded, the largest first, and what is not, a line each."""
        by_size = sorted(self.files.items(), key=lambda item: -item[1].stat().st_size)
        lines = [f"uploading {len(by_size)} files, {_kib(self.size)}:"]
        lines += [f"  {name} {_kib(file.stat().st_size)}{_points(file)}" for name, file in by_size]
        lines += [f"not uploaded, must be on the cluster under the same path: {path}" for path in self.models]
        return lines

    def largest(self) -> str:
        """Return the largest files and their sizes, for an error."""
        by_size = sorted(self.files.items(), key=lambda item: -item[1].stat().st_size)
        return ", ".join(f"{name} ({_mib(file.stat().st_size)})" for name, file in by_size[:SHOWN_LARGEST])

    def write(self, archive: Path) -> None:
        """Write the archive; equal files give equal bytes, whenever it is made."""
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for name, file in sorted(self.files.items()):
                entry = zipfile.ZipInfo(name, EPOCH)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                with file.open("rb") as source, target.open(entry, "w", force_zip64=True) as packed:
                    shutil.copyfileobj(source, packed)


def collect(loaded: LoadedRecipe) -> Upload:
    """Return what to upload for a recipe that was loaded here.

    RecipeError when a file cannot be read, is no plain file, or looks like a secret; no file is read for that.
    """
    chain = _chain(loaded.path)
    recipe = chain[0]
    named = list(_files(loaded.recipe, ()))
    files = sorted({*chain, *(file for _, file, _ in named)})
    top = Path(os.path.commonpath([file.parent for file in files]))
    for file in files:
        _check(file)
    elsewhere = [
        _override(loaded.recipe, loc, os.path.relpath(file, recipe.parent) + function)
        for loc, file, function in named
        if _is_absolute(loaded.root, loc)
    ]
    models = [(loc, path) for loc, path in _models(loaded.recipe, ()) if os.path.isabs(path)]
    elsewhere += [_override(loaded.recipe, loc, path) for loc, path in models]
    return Upload(
        recipe=recipe.relative_to(top).as_posix(),
        files={file.relative_to(top).as_posix(): file for file in files},
        overrides=(*loaded.overrides, *elsewhere, "ray.address=auto"),
        models=tuple(dict.fromkeys(path for _, path in models)),
    )


def _check(file: Path) -> None:
    """Raise RecipeError for a file that must not, or cannot, be uploaded; a link is judged by what it leads to, too."""
    if not os.access(file, os.R_OK):
        raise RecipeError(f"{file}: not readable, so it cannot be uploaded")
    if not stat.S_ISREG(file.stat().st_mode):
        raise RecipeError(f"{file}: no plain file, so it cannot be uploaded")
    for path in (file, file.resolve()):
        if SECRET_FILE.fullmatch(path.name) or SECRET_FOLDERS & set(path.parts[:-1]):
            raise RecipeError(f"{file}: looks like a secret, so it is not uploaded; take it out of the recipe")


def _points(file: Path) -> str:
    return f" (a link to {file.resolve()})" if file.is_symlink() else ""


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _kib(size: int) -> str:
    return f"{size / 2**10:.1f} KiB"


def _is_absolute(root: Node, loc: Loc) -> bool:
    """Return whether a path was written so that it does not depend on where the recipe lies."""
    node, _ = root.nearest(loc)
    return str(node.value).startswith(("/", "~"))


def _chain(path: Path) -> list[Path]:
    """Return the recipe's file and those it extends."""
    chain = [Path(os.path.abspath(path))]
    while isinstance(root := parse(read_text(chain[-1]), chain[-1]).value, dict) and "extends" in root:
        chain.append(Path(os.path.abspath(chain[-1].parent / str(root["extends"].value))))
    return chain


def _files(section: BaseModel, loc: Loc) -> Iterator[tuple[Loc, Path, str]]:
    """Yield where a file is named, the file, and the `:function` behind it."""
    match section:
        case PathData():
            yield (*loc, "path"), section.path, ""
        case FunctionJudge():
            file, _, function = section.path.rpartition(":")
            yield (*loc, "path"), Path(file), f":{function}"
        case ModelSource(chat_template=Path() as template):
            yield (*loc, "chat_template"), template, ""
    for inner, where in _sections(section, loc):
        yield from _files(inner, where)


def _models(section: BaseModel, loc: Loc) -> Iterator[tuple[Loc, str]]:
    match section:
        case ModelSource():
            yield (*loc, "path"), section.path
        case LlmJudge(url=None):
            yield (*loc, "model"), section.model
        case Recipe():
            for name, path in section.checkpoints.items():
                yield (*loc, "checkpoints", name), path
    for inner, where in _sections(section, loc):
        yield from _models(inner, where)


def _sections(section: BaseModel, loc: Loc) -> Iterator[tuple[BaseModel, Loc]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, BaseModel):
                yield item, (*loc, name, index) if isinstance(value, list) else (*loc, name)


def _override(recipe: Recipe, loc: Loc, value: str) -> str:
    return f"{'.'.join(_keys(recipe, loc))}={json.dumps(value)}"


def _keys(recipe: Recipe, loc: Sequence[str | int]) -> Iterator[str]:
    """Yield the keys of a place as `--set` writes them: stages by name."""
    for step in loc:
        yield recipe.stages[step].name if isinstance(step, int) else step
