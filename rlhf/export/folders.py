"""Model folders on their way out: whole or not there, and without a word of where they were made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf.errors import DataError, RecipeError
from rlhf.manifest import broken, plain_files, shown

PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path", "tokenizer_name_or_path")
CARD = "README.md"


@contextmanager
def made_whole(output: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `output` at the end, or vanishes with whatever goes wrong.

    Raises RecipeError where `output` is there already and not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RecipeError(f"{output} is there already; choose another folder with -o, or remove it")
    partial = output.absolute().with_name(f".{output.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output.absolute())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_whole(source: Path, target: Path, sealed: Mapping[str, Any] | None) -> None:
    """Copy the sealed files of a folder, and no others, and compare the copy with the hashes of when they were made.

    What somebody put beside them (notes, links to other places) stays where it is. Of a folder that has no seals, all
    plain files are copied. Any user may read the copies.
    """
    for name in sealed or plain_files(source):
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
            raise DataError(f"{shown(str(source))}: {shown(name)} leads out of the folder")
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, copy, follow_symlinks=False)
    if sealed and (wrong := broken(target, sealed)):
        raise DataError(f"the copy of {shown(str(source))} is not whole: {wrong[0]}")


def forget_places(folder: Path, base: str | None = None) -> None:
    """Take the paths of this machine out of the folder's JSON configs; an adapter's base becomes `base`."""
    for file in folder.glob("*config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        named = [name for name in PLACES if isinstance(config.get(name), str) and Path(config[name]).is_absolute()]
        for name in named:
            del config[name]
        if base is not None and file.name == "adapter_config.json":
            config["base_model_name_or_path"] = base
        elif not named:
            continue
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
