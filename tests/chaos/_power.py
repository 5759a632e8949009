"""A disk that loses power: what would be found on it afterwards, at every flush of a run that is not disturbed.

A file's content is sure once the file is flushed (`fsync`), a name once its folder is. Of all later changes any may
have arrived: content is old, cut, followed by zeros, or new; a name is there or not, its old file or its new one. What
was renamed is found under one of its names.
"""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

Listing = dict[str, int]
Tree = dict[str, "bytes | Tree | str"]
"""What is found in a folder: files, folders, and where symbolic links lead."""


class Disk:
    """While entered, follows what is sure below `root`, and tells `flushing` of every flush just before it."""

    def __init__(self, root: Path, rng: random.Random, flushing: Callable[[Path], None]) -> None:
        self.root, self.rng, self.flushing = root, rng, flushing
        self.contents: dict[int, bytes] = {}
        self.listings: dict[int, Listing] = {}
        self.same: dict[bytes, bytes] = {}
        self.pins: list[int] = []
        self.fsync = os.fsync

    def __enter__(self) -> Disk:
        """Take all that is there as sure, and follow flushes."""
        for folder, _, files in os.walk(self.root):
            self._folder(Path(folder))
            for name in files:
                if not os.path.islink(os.path.join(folder, name)):
                    self._file(Path(folder, name))
        os.fsync = self._flush
        return self

    def __exit__(self, *_: object) -> None:
        """Follow no more."""
        os.fsync = self.fsync
        for handle in self.pins:
            os.close(handle)

    def found(self) -> Tree:
        """Return what would be found if the power failed now."""
        return self._found_folder(self.root.stat().st_ino, self._present())

    def _flush(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if not path.is_relative_to(self.root):
            return
        self.flushing(path)
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self._folder(path)
        else:
            self._file(path)

    def _folder(self, path: Path) -> None:
        self.listings[self._pinned(path)] = _listing(path)

    def _file(self, path: Path) -> None:
        content = path.read_bytes()
        self.contents[self._pinned(path)] = self.same.setdefault(content, content)

    def _pinned(self, path: Path) -> int:
        """Return a path's number, which no other file gets while it is open here."""
        number = path.stat().st_ino
        if number not in self.contents and number not in self.listings:
            self.pins.append(os.open(path, os.O_RDONLY))
        return number

    def _present(self) -> dict[int, Path]:
        paths = [self.root, *self.root.rglob("*")]
        return {path.lstat().st_ino: path for path in paths}

    def _found_folder(self, number: int, present: dict[int, Path]) -> Tree:
        found: Tree = {}
        for name, child in self._names(number, present).items():
            path = present.get(child)
            if path is not None and path.is_symlink():
                found[name] = os.readlink(path)
            elif child in self.listings or (path is not None and path.is_dir()):
                found[name] = self._found_folder(child, present)
            else:
                found[name] = self._found_file(child, path)
        return found

    def _names(self, number: int, present: dict[int, Path]) -> Listing:
        """Return a folder's names after the failure."""
        old = self.listings.get(number, {})
        new = _listing(present[number]) if number in present else old
        kind = self.rng.choice(("old", "new", "mixed"))
        if kind != "mixed":
            return dict(old if kind == "old" else new)
        before, after = ({number: name for name, number in names.items()} for names in (old, new))
        found: Listing = {}
        for child in {**before, **after}:
            places = [names[child] for names in (before, after) if child in names]
            if len(places) == 2 or self.rng.random() < 0.5:
                place = self.rng.choice(places)
                if place not in found or self.rng.random() < 0.5:
                    found[place] = child
        for name in old.keys() & new.keys():  # what was replaced is there, old or new
            found.setdefault(name, self.rng.choice((old[name], new[name])))
        return found

    def _found_file(self, number: int, path: Path | None) -> bytes:
        old = self.contents.get(number, b"")
        new = path.read_bytes() if path is not None else old
        if new == old:
            return old
        sure = len(os.path.commonprefix([old, new]))
        cut = self.rng.randrange(sure, len(new) + 1)
        kind = self.rng.choice(("old", "cut", "zeros", "new"))
        content = {"old": old, "cut": new[:cut], "zeros": new[:cut] + bytes(len(new) - cut), "new": new}[kind]
        return self.same.setdefault(content, content)


def write_tree(tree: Tree, folder: Path) -> None:
    """Write what was found into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        if isinstance(content, dict):
            write_tree(content, folder / name)
        elif isinstance(content, str):
            (folder / name).symlink_to(content)
        else:
            (folder / name).write_bytes(content)


def _listing(folder: Path) -> Listing:
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat(follow_symlinks=False).st_ino for entry in entries}
