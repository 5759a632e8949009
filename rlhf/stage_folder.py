"""The folder of one stage in a run: whether it is done or resumes, where it is made, and how it takes its name."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf import checkpoint
from rlhf.checkpoint import QUARANTINE
from rlhf.disk import failures_told
from rlhf.done_file import (
    CHECKPOINTS,
    FILES,
    Damaged,
    checkpoint_sizes,
    damage,
    damaged,
    file_digests,
    quarantine_checkpoints,
    read_done,
    write_done,
)
from rlhf.errors import RecipeError
from rlhf.fingerprint import completed, content_key, differences
from rlhf.manifest import SEALED, shown
from rlhf.report.results import Cost
from rlhf.stage_places import (
    DONE,
    STATES,
    folder_bytes,
    kept_folders,
    new_place,
    place_of_work,
    remove_kept,
    remove_leftovers,
    rename,
    set_aside,
)
from rlhf.stages.sft import Summary

log = logging.getLogger("rlhf")
MIB = 2**20
SHOWN, MOST = 3, 12
"""So many differences of settings are named in passing, and in an error."""


class StageFolder:
    """`stages/<name>` of a run, for the content that the stage has now (`rlhf.fingerprint`).

    Nothing finished is deleted here: a stage that another content, `--restart` or damage makes stale stays as it is
    until its successor is done, and is kept then (`rlhf.stage_places`). `check` comes first and finds out what there
    is; then either `reuse`, or `prepare` and `finish`. A process may die anywhere in between: the next `check`
    completes it.
    """

    def __init__(
        self, folder: Path, content: Mapping[str, Any], without_defaults: Mapping[str, Any], restart: bool = False
    ) -> None:
        self.folder = folder
        self.content = content
        self.without_defaults = without_defaults
        self.restart = restart
        self.key = content_key(content)
        self.whole: Path | None = None
        self.resumes = False
        self.why = ""

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.folder.name

    @property
    def place(self) -> Path:
        """Where the stage is made."""
        return place_of_work(self.folder)

    def check(self) -> None:
        """Find out whether the stage is done (`whole`), or resumes, and take the key that it was made under.

        Raises:
            Damaged: it is done, and its files are not as they were.
            RecipeError: it was interrupted with other settings.
        """
        with failures_told(self.folder.parent, f"stage {self.name} cannot be checked"):
            self._complete()
            if self.restart:
                self._keep_key()
                return
            if self._interrupted():
                return
            for folder in (self.folder, *reversed(kept_folders(self.folder))):
                done = self._done(folder)
                if done is not None and self._wanted(done["content"]):
                    if wrong := damage(folder, done):
                        raise damaged(folder, wrong[0], done["key"])
                    self.whole, self.key = folder, done["key"]
                    return
            self._refuse_other_settings()

    def reuse(self, keep_old: int, say: Callable[[str], None]) -> None:
        """Give the stage that `check` found whole its name back, where it was replaced before."""
        assert self.whole is not None
        with failures_told(self.folder, f"stage {self.name} cannot be brought back"):
            if self.whole != self.folder:
                self._vacate()
                rename(self.whole, self.folder)
                say(f"{self.name}: {self.whole.name}, made with these settings before, is brought back")
            self._remove_states(self.folder)
            begun = new_place(self.folder)
            if begun.is_dir() and not checkpoint.states(begun / STATES):
                say(f"{self.name}: the attempt to make it again saved nothing; the finished one is used")
                shutil.rmtree(begun)
            self._bound(keep_old, say)

    def prepare(self) -> None:
        """Make the stage's place empty, or leave it where the stage resumes; what is finished stays untouched."""
        if self.why:
            log.warning("stage %s runs again: %s", self.name, self.why)
        if self.resumes:
            saved = self._saved()
            for line in quarantine_checkpoints(self.place, saved.info.get(CHECKPOINTS, {}) if saved else {}):
                log.warning("stage %s: %s", self.name, line)
            return
        with failures_told(self.folder, f"stage {self.name} cannot begin"):
            place = self.place
            if not self.restart:
                checkpoint.newest(place / STATES, self.key)  # there is none: damaged ones are quarantined, and said
                self._keep_unproven(place)
            _clear(place, everything=self.restart)
            place.mkdir(parents=True, exist_ok=True)

    def finish(
        self, summary: Summary, cost: Cost, made_from: Mapping[str, Any], keep_old: int, say: Callable[[str], None]
    ) -> None:
        """Seal what the stage left, say that it is done, and give it the stage's name.

        `made_from` tells the model that the run began with, and on what it ran.
        """
        place = self.place
        with failures_told(place, f"stage {self.name} cannot be finished"):
            done = {
                "key": self.key,
                "cost": asdict(cost),
                "summary": summary,
                "content": self.content,
                "made_from": made_from,
                **{key: _sealed(place / name) for name, key in SEALED.items()},
                FILES: file_digests(place),
                CHECKPOINTS: checkpoint_sizes(place),
            }
            write_done(place / DONE, done)
            self._remove_states(place)
            if place != self.folder:
                self._take_name()
            self._bound(keep_old, say)

    def _complete(self) -> None:
        """Finish what a process was at when it died: the stage was done, and had not taken its name yet."""
        new = new_place(self.folder)
        if not os.path.lexists(new / DONE):
            return
        try:
            read_done(new / DONE)
        except Damaged:
            if not self.restart:
                raise
            set_aside(new, None)
            return
        self._take_name()

    def _keep_key(self) -> None:
        """Keep the key of a stage that begins again with the same content, so that what follows it stays valid."""
        try:
            done = read_done(self.folder / DONE)
        except Damaged:
            return
        if self._wanted(done["content"]):
            self.key = done["key"]

    def _wanted(self, content: object) -> bool:
        """Return whether what was made of a content is what the stage has now."""
        old = content if isinstance(content, Mapping) else {}
        return content_key(completed(old, self.content, self.without_defaults)) == content_key(self.content)

    def _changed(self, content: object, most: int) -> str:
        """Return in words what differs between a content and the one that the stage has now."""
        old = content if isinstance(content, Mapping) else {}
        changed = differences(completed(old, self.content, self.without_defaults), self.content)
        return ", ".join(changed[:most]) + (f" and {len(changed) - most} more" if changed[most:] else "")

    def _interrupted(self) -> bool:
        """Return whether the stage resumes from a state that it saved with the settings it has now."""
        saved = self._saved()
        if saved is not None and self._wanted(saved.info.get("content")):
            self.key, self.resumes = saved.key, True
        return self.resumes

    def _saved(self) -> checkpoint.Saved | None:
        place = self.place
        return None if os.path.lexists(place / DONE) else checkpoint.begun(place / STATES)

    def _done(self, folder: Path) -> dict[str, Any] | None:
        """Return the `done.json` of a finished stage; None without one, and for a kept stage where it is damaged."""
        if not os.path.lexists(folder / DONE):
            return None
        try:
            done = read_done(folder / DONE)
        except Damaged:
            if folder == self.folder:
                raise
            return None
        if folder == self.folder and not self.why:
            self.why = self._changed(done["content"], SHOWN)
        return done

    def _refuse_other_settings(self) -> None:
        saved = self._saved()
        if saved is None:
            return
        raise RecipeError(
            f"stages.{self.name} was interrupted after step {saved.step} with other settings:"
            f" {self._changed(saved.info.get('content'), MOST)}\n  set them back to go on, begin the stage again with"
            f" --restart {self.name}, or take another folder with --output"
        )

    def _take_name(self) -> None:
        """Give what is done in the new place the stage's name; both renames may be done by different processes."""
        self._vacate()
        rename(new_place(self.folder), self.folder)

    def _vacate(self) -> None:
        """Free the stage's name: what has it is kept."""
        if not os.path.lexists(self.folder):
            return
        if not os.path.lexists(self.folder / DONE) and not os.path.lexists(new_place(self.folder)):
            rename(self.folder, new_place(self.folder))  # it is unfinished, and resumes from there
            return
        try:
            key = read_done(self.folder / DONE)["key"]
        except Damaged:
            key = None
        set_aside(self.folder, key)

    def _keep_unproven(self, place: Path) -> None:
        """Set aside a model that has neither a `done.json` nor a state: it may be a finished one that lost its own."""
        if place == self.folder and any((place / name).exists() for name in SEALED):
            kept = set_aside(place, None)
            log.warning("stage %s: a model without %s is kept as %s", self.name, DONE, shown(kept.name))

    def _remove_states(self, folder: Path) -> None:
        """Remove the states of a finished stage."""
        left = folder / f".{STATES}"
        if (folder / STATES).exists():  # renamed first, so that what is left of them is never taken for damaged states
            shutil.rmtree(left, ignore_errors=True)
            (folder / STATES).rename(left)
        shutil.rmtree(left, ignore_errors=True)

    def _bound(self, keep_old: int, say: Callable[[str], None]) -> None:
        """Remove the oldest of what was replaced, and say once what is kept, and how large it is."""
        remove_leftovers(self.folder)
        kept = kept_folders(self.folder)
        whole = [folder for folder in kept if not _is_damaged(folder)] if len(kept) > keep_old else []
        stale = whole[: max(0, len(whole) - keep_old)]  # a damaged one stays: its owner may want to mend it
        for folder in stale:
            size = folder_bytes(folder) / MIB
            say(f"{self.name}: {shown(folder.name)} ({size:,.1f} MiB) is removed, as recovery.keep_old is {keep_old}")
            remove_kept(folder)
        if (fresh := [folder for folder in kept if folder not in stale]) and self.whole != self.folder:
            size = sum(map(folder_bytes, fresh)) / MIB
            names = ", ".join(shown(folder.name) for folder in fresh)
            say(f"{self.name}: the finished stage before it is kept as {names} ({size:,.1f} MiB, recovery.keep_old)")


def _is_damaged(folder: Path) -> bool:
    """Return whether a finished stage is not as it was made, or nothing says how it was."""
    if not os.path.lexists(folder / DONE):
        return True
    try:
        return bool(damage(folder, read_done(folder / DONE)))
    except Damaged:
        return True


def _clear(place: Path, everything: bool) -> None:
    """Remove what an unfinished stage left in its place; quarantined states stay where not `everything` goes."""
    if everything or not list(place.glob(f"{STATES}/{QUARANTINE}*")):
        if place.exists():
            shutil.rmtree(place)
        return
    for path in (*place.iterdir(), *(place / STATES).iterdir()):
        if path.name == STATES or path.name.startswith(QUARANTINE):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sealed(folder: Path) -> dict[str, Any]:
    return dict(checkpoint.seal(folder)) if folder.exists() else {}
