"""States of a stage on disk: each is whole or not there.

A state is a folder `step-00000012` with a manifest of every file's size and sha256. It is filled under another name
(`.partial-...`), flushed, and renamed when complete, so that whatever is called `step-...` was once whole; what
changed since is found when it is read, and set aside as `quarantine-step-...`. One process writes below a root at a
time. This layer knows files only: what is in them is the caller's.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf import disk
from rlhf.errors import ResourceError
from rlhf.manifest import MANIFEST, DamagedManifest, Seal, broken, flush_folder, read_manifest, seal, write_manifest

__all__ = [
    "QUARANTINE",
    "Saved",
    "begun",
    "broken",
    "newest",
    "problems",
    "prune",
    "seal",
    "states",
    "step_of",
    "write",
]

log = logging.getLogger("rlhf")
PARTIAL = ".partial-"
QUARANTINE = "quarantine-"
REPLACED = "-replaced-"
STEP_NAME = re.compile(rf"step-([0-9]{{8,}})({REPLACED}[0-9a-f]+)?")
GIB = 2**30


@dataclass(frozen=True)
class Saved:
    """A whole state: its folder, its step, the key of what made it, and the JSON its writer gave."""

    folder: Path
    step: int
    key: str
    info: dict[str, Any]


def write(
    root: Path,
    step: int,
    key: str,
    fill: Callable[[Path], Mapping[str, Seal] | None],
    info: Mapping[str, Any],
    bytes_needed: int = 0,
) -> Saved:
    """Save a state: `fill` writes its files into the folder it gets, itself or through other processes.

    It returns the seals of files that their writers have sealed and flushed already, by relative path; only the other
    files are read again, to seal them here.

    When this returns, the state is on disk under its final name; when it raises, or the process dies at any point,
    there is either the whole state or none, and the older ones are as they were. A state of the same step is renamed
    to `step-...-replaced-...` just before the new one, complete by then, takes its name, and removed only after that;
    under either name it is found by `states`. Raises ResourceError when less than `bytes_needed` is free or the disk
    fails or is full; errors of `fill` pass through.
    """
    content: dict[str, Any] = {"step": step, "key": key, "info": json.loads(json.dumps(dict(info)))}
    final = root / f"step-{step:08d}"
    saving = f"step {step} cannot be saved"
    partial = root / f"{PARTIAL}{final.name}-{secrets.token_hex(4)}"
    with disk.failures_told(root, saving):
        _make_room(root, step, bytes_needed)
        partial.mkdir()
    try:
        with disk.failures_told(partial, saving):
            content["files"] = seal(partial, fill(partial))
            if MANIFEST in content["files"]:
                raise ValueError(f"{MANIFEST} at the top of a state is not for its writer")
            write_manifest(partial, content)
            _place(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Saved(final, step, key, content["info"])


def newest(root: Path, key: str | None = None) -> Saved | None:
    """Return the newest whole state (of `key`), every hash checked; None when there is none.

    A damaged one is renamed to `quarantine-step-...` with a warning, and the next older one is tried. States of
    another key are left alone. Raises ResourceError, and renames nothing, when a state cannot be read for now (no
    permission, too many open files).
    """
    again = True
    while again:  # a state that somebody else removed meanwhile may have had a newer one beside it
        again = False
        for folder in reversed(states(root)):
            try:
                content = read_manifest(folder)
                if key is not None and content["key"] != key:
                    continue
                wrong = _differences(folder, content)
            except DamagedManifest as error:
                wrong = [str(error)]
            if not wrong:
                return Saved(folder, content["step"], content["key"], content["info"])
            if folder.exists():
                _quarantine(folder, wrong)
            else:
                again = True
    return None


def begun(root: Path) -> Saved | None:
    """Return the newest state as its manifest tells it, its files unchecked; None where no manifest can be read."""
    for folder in reversed(states(root)):
        with suppress(DamagedManifest):
            content = read_manifest(folder)
            return Saved(folder, content["step"], content["key"], content["info"])
    return None


def problems(folder: Path) -> list[str]:
    """Return every difference between a state and its manifest in words, such as `policy.safetensors: changed`."""
    try:
        return _differences(folder, read_manifest(folder))
    except DamagedManifest as error:
        return [str(error)]


def states(root: Path) -> list[Path]:
    """Return the folders of states below `root`, oldest first, damaged ones too; quarantined ones are not among them.

    A state that was about to be replaced when its process died comes right before the one with its step, if any.
    """
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [root / name for name in names if STEP_NAME.fullmatch(name)]
    return sorted(found, key=lambda folder: (step_of(folder), REPLACED not in folder.name, folder.name))


def step_of(folder: Path) -> int:
    """Return the step that a state's folder is named after."""
    named = STEP_NAME.fullmatch(folder.name)
    if named is None:
        raise ValueError(f"{folder} is not named like a state")
    return int(named[1])


def prune(
    root: Path, keep_last: int, best: tuple[str, Literal["max", "min"]] | None, written: Saved | None = None
) -> None:
    """Remove states but the `keep_last` newest, the newest whole one, and the best by `info["metrics"][best[0]]`.

    Of every key as many are kept, so that a changed recipe takes nothing from the one before it. A metric that is
    missing or not finite never makes a state the best; of equal ones the newer is kept. `written` has just been
    written, and is not read again.
    """
    groups: dict[str, dict[Path, dict[str, Any]]] = {}
    for folder in states(root):
        try:
            content = read_manifest(folder)
        except DamagedManifest:
            continue  # left for `newest`, which sets it aside and says so
        groups.setdefault(content["key"], {})[folder] = content["info"]
    for key, group in groups.items():
        last = list({step_of(folder): folder for folder in group}.values())
        kept = set(last[max(0, len(last) - keep_last) :])
        if best is not None:
            kept |= _best({folder: group[folder] for folder in last}, *best)
        if kept >= group.keys():
            continue
        whole = written if written is not None and written.folder == last[-1] else newest(root, key)
        for folder in group:
            if folder not in kept and folder.exists() and (whole is None or folder != whole.folder):
                _discard(folder)


def _best(infos: Mapping[Path, Mapping[str, Any]], metric: str, mode: Literal["max", "min"]) -> set[Path]:
    sign = 1 if mode == "max" else -1
    scores = {folder: _metric(info, metric) for folder, info in infos.items()}
    finite = [(sign * score, step_of(folder), folder) for folder, score in scores.items() if math.isfinite(score)]
    return {max(finite)[-1]} if finite else set()


def _metric(info: Mapping[str, Any], name: str) -> float:
    metrics = info.get("metrics")
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    return float(value) if isinstance(value, int | float) else math.nan


def _differences(folder: Path, content: Mapping[str, Any]) -> list[str]:
    found = broken(folder, content["files"])
    named = folder.name.partition(REPLACED)[0]
    if named != f"step-{content['step']:08d}":
        found.insert(0, f"{MANIFEST}: of step {content['step']}, in a folder named {named}")
    return found


def _place(partial: Path, final: Path) -> None:
    """Give a complete state its name; the one that had it is removed when that is on disk."""
    root = final.parent
    older = [folder for folder in states(root) if folder.name.startswith(final.name + REPLACED)]
    if os.path.lexists(final):
        older.append(root / f"{final.name}{REPLACED}{secrets.token_hex(4)}")
        os.rename(final, older[-1])
    os.rename(partial, final)
    flush_folder(root)
    for folder in older:
        _discard(folder)


def _make_room(root: Path, step: int, bytes_needed: int) -> None:
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        flush_folder(root.parent)
    for stale in root.glob(f"{PARTIAL}*"):
        _remove(stale)
    free = shutil.disk_usage(root).free
    if free < bytes_needed:
        raise ResourceError(
            f"{root}: the state of step {step} needs {bytes_needed / GIB:.2f} GiB and {free / GIB:.2f} GiB are free; "
            "free some space, lower recovery.keep_last, or put the run elsewhere with --output"
        )


def _quarantine(folder: Path, wrong: list[str]) -> None:
    target = folder.with_name(QUARANTINE + folder.name)
    if os.path.lexists(target):
        target = target.with_name(f"{target.name}-{secrets.token_hex(4)}")
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    try:
        os.rename(folder, target)
    except FileNotFoundError:
        return  # somebody else has just set it aside or removed it
    except OSError as error:
        log.warning("%s is damaged (%s%s), not used, and cannot be renamed: %s", folder, wrong[0], more, error.strerror)
    else:
        log.warning("%s is damaged (%s%s), not used; it is now %s", folder, wrong[0], more, target.name)


def _discard(folder: Path) -> None:
    """Remove a state so that a half-removed one is never taken for a state."""
    doomed = folder.with_name(f"{PARTIAL}{folder.name}-{secrets.token_hex(4)}")
    try:
        os.rename(folder, doomed)
        flush_folder(folder.parent)
    except OSError as error:
        log.warning("%s cannot be removed: %s", folder, error.strerror)
    else:
        _remove(doomed)


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)
