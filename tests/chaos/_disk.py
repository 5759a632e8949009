"""A file system that fails at one call: what Python code asks of `os` and `open` is counted and interrupted."""

from __future__ import annotations

import builtins
import io
import os
import random
import shutil
import threading
from collections.abc import Callable
from typing import Any

CALLS = ("open", "close", "fsync", "rename", "mkdir", "rmdir", "unlink", "scandir", "stat", "lstat", "statvfs")
DIED = 77


class FaultyDisk:
    """While entered, the n-th call of this process does what `fault` names; with `at=0` calls are only counted.

    A number is an error of the system, such as ENOSPC; `then` says whether later calls fail too. "kill" ends the
    process at that call with the exit code DIED. "power" does the same and loses what was not flushed: written files
    are cut anywhere, new entries of folders vanish or stay, and of the last renames any number is undone.
    """

    def __init__(self, at: int, fault: int | str, then: bool, rng: random.Random) -> None:
        self.at, self.fault, self.then, self.rng = at, fault, then, rng
        self.calls = 0
        self.struck = False
        self.lock = threading.RLock()
        self.unflushed: set[str] = set()
        self.entries: list[str] = []
        self.renames: list[tuple[str, str]] = []
        self.real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CALLS}
        self.real_open = builtins.open

    def __enter__(self) -> FaultyDisk:
        """Put the counting calls in place."""
        for name in CALLS:
            setattr(os, name, getattr(self, f"_{name}", None) or self._counted(name))
        put_open: Any = self._open_file
        builtins.open = io.open = put_open
        return self

    def __exit__(self, *_: object) -> None:
        """Put the real calls back."""
        for name, call in self.real.items():
            setattr(os, name, call)
        builtins.open = io.open = self.real_open

    def step(self, finish: Callable[[], object] = lambda: None) -> None:
        """Count a call and let it fail when it is its turn; `finish` is what such a call still does when it fails."""
        with self.lock:
            self.calls += 1
            if self.calls != self.at and not (self.struck and self.then):
                return
            self.struck = True
            finish()
            if isinstance(self.fault, int):
                raise OSError(self.fault, os.strerror(self.fault))
            if self.fault == "power":
                self.__exit__()
                self._lose_power()
            os._exit(DIED)

    def _counted(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.step()
            return self.real[name](*arguments, **options)

        return call

    def _close(self, handle: int) -> None:
        self.step(lambda: self.real["close"](handle))
        self.real["close"](handle)

    def _fsync(self, handle: int) -> None:
        self.step()
        self.real["fsync"](handle)
        path = os.readlink(f"/proc/self/fd/{handle}")
        with self.lock:
            self.unflushed.discard(path)
            self.entries = [entry for entry in self.entries if os.path.dirname(entry) != path]
            self.renames = [pair for pair in self.renames if os.path.dirname(pair[1]) != path]

    def _mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        self.step()
        self.real["mkdir"](path, *arguments, **options)
        with self.lock:
            self.entries.append(os.fspath(path))

    def _rename(self, source: Any, target: Any) -> None:
        self.step()
        self.real["rename"](source, target)
        old, new = os.fspath(source), os.fspath(target)

        def moved(path: str) -> str:
            return new + path[len(old) :] if path == old or path.startswith(old + "/") else path

        with self.lock:
            self.unflushed = {moved(path) for path in self.unflushed}
            self.entries = [moved(path) for path in self.entries if path != old]
            self.renames.append((old, new))

    def _open_file(self, path: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not isinstance(path, str | os.PathLike):
            return self.real_open(path, mode, *arguments, **options)
        self.step()
        file = self.real_open(path, mode, *arguments, **options)
        if {"w", "x", "a"} & set(mode):
            with self.lock:
                self.entries.append(os.fspath(path))
                self.unflushed.add(os.fspath(path))
        return _File(self, file, os.fspath(path))

    def _lose_power(self) -> None:
        for path in filter(os.path.isfile, self.unflushed):
            os.truncate(path, self.rng.randrange(os.path.getsize(path) + 1))
        for path in self.entries:
            if self.rng.random() < 0.5 or not os.path.exists(path):
                continue
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        kept = self.rng.randrange(len(self.renames) + 1)
        for source, target in reversed(self.renames[kept:]):
            os.rename(target, source)


class _File:
    """An open file whose reads, writes, flushes and closing are counted; a failing write writes half."""

    def __init__(self, disk: FaultyDisk, file: Any, path: str) -> None:
        self.disk, self.file, self.path = disk, file, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self.file)

    def write(self, data: Any) -> int:
        self.disk.step(lambda: (self.file.write(data[: len(data) // 2]), self.file.flush()))
        with self.disk.lock:
            self.disk.unflushed.add(self.path)
        return self.file.write(data)

    def read(self, *arguments: Any) -> Any:
        self.disk.step()
        return self.file.read(*arguments)

    def readinto(self, buffer: Any) -> Any:
        self.disk.step()
        return self.file.readinto(buffer)

    def flush(self) -> None:
        self.disk.step()
        self.file.flush()

    def close(self) -> None:
        if not self.file.closed:
            self.disk.step(self.file.close)
            self.file.close()
