"""How far a run is, from what its folder holds; nothing in it is changed, and the run may be going on meanwhile."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from rlhf import checkpoint
from rlhf.amounts import duration
from rlhf.done_file import Damaged, read_done
from rlhf.metrics_file import METRICS, metric_row, numbers
from rlhf.progress import brief
from rlhf.recipe.schema import Recipe
from rlhf.recipe.seeds import expand_seeds
from rlhf.recipe.stage_schema import upstream
from rlhf.report.runs import read_recipe
from rlhf.run_record import RunRecord, read_record
from rlhf.stage_places import DONE, STATES, new_place, stage_folder
from rlhf.stage_progress import read_progress
from rlhf.untrusted import visible

if TYPE_CHECKING:
    from rich.console import RenderableType

StageState = Literal["done", "running", "interrupted", "failed", "waiting", "damaged"]
RunState = Literal["done", "running", "interrupted", "failed", "new"]
TAIL = 64 << 10


@dataclass(frozen=True)
class StageStatus:
    """One stage; times are in seconds. A damaged one has a `done.json` that cannot be read.

    `step` of `total` in its part `label`; `elapsed` is what a finished stage took, or since when this process is at
    it; `rest` is what the part will still take at the pace so far; `saved_step` is the newest saved state, from which
    it would go on, and `saved_age` how old that is. `behind` names the stage whose failure kept this one from running.
    """

    name: str
    kind: str
    state: StageState
    label: str = ""
    step: int | None = None
    total: int | None = None
    metrics: Mapping[str, float] | None = None
    elapsed: float | None = None
    rest: float | None = None
    saved_step: int | None = None
    saved_age: float | None = None
    behind: str = ""


@dataclass(frozen=True)
class RunStatus:
    """A run; `alive` says whether a process holds its folder now, `error` why the last one did not finish."""

    folder: str
    name: str
    state: RunState
    alive: bool
    pid: int | None
    host: str
    began: float | None
    elapsed: float | None
    error: str
    stages: tuple[StageStatus, ...]

    @property
    def finished(self) -> int:
        """How many stages are done."""
        return sum(stage.state == "done" for stage in self.stages)


def read_status(folder: Path) -> RunStatus:
    """Return how far the run of a folder is; DataError where it is no run folder, or its recipe is damaged."""
    plain = read_recipe(folder)
    record, alive = read_record(folder), in_use(folder)
    stages: list[StageStatus] = []
    keys: dict[str, str | None] = {}
    damages: list[str] = []
    for name, kind, sources in _stages(plain):
        place = present_place(folder, name, record)
        first = all(keys.values())
        try:
            done = _done(place, {source: keys[source] for source in sources & keys.keys()})
        except Damaged as error:
            damages.append(str(error))
            done = None
            stages.append(StageStatus(name, kind, "damaged"))
        else:
            stages.append(_stage(name, place, kind, done, first, alive, record))
        keys[name] = done["key"] if done else None
    undone = not all(keys.values())
    now = time.time()
    ended = now if alive or record is None else record.ended
    return RunStatus(
        folder=str(folder),
        name=str(plain["name"]),
        state=_run_state(undone, alive, record),
        alive=alive,
        pid=record.pid if record else None,
        host=record.host if record else "",
        began=record.began if record else None,
        elapsed=ended - record.began if record and ended else None,
        error=damages[0] if damages else _error(record, alive, undone),
        stages=tuple(_behind_failure(stages)),
    )


def _behind_failure(stages: Sequence[StageStatus]) -> Iterator[StageStatus]:
    """Yield the stages of a run; those that wait behind a failed one name it."""
    failed = ""
    for stage in stages:
        yield replace(stage, behind=failed) if stage.state == "waiting" else stage
        failed = failed or (stage.name if stage.state == "failed" else "")


def present_place(run: Path, name: str, record: RunRecord | None) -> Path:
    """Return the folder that tells of a stage: where the last run worked on its successor, else that of its name."""
    folder = stage_folder(run, name)
    new = new_place(folder)
    return new if record and record.stage == name and new.is_dir() else folder


def in_use(folder: Path) -> bool:
    """Return whether a process, on this machine or another one, holds the lock of a run folder.

    It asks for a shared lock and lets it go at once; a run that begins in that instant waits for it.
    """
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def last_metrics(path: Path) -> dict[str, float]:
    """Return the newest value of each metric in the last rows of a `metrics.jsonl`; damaged lines are left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in lines[int(size > TAIL) :]:
        found |= numbers(metric_row(line) or {})
    return found


def _stages(plain: Mapping[str, Any]) -> list[tuple[str, str, set[str]]]:
    """Return name, kind and sources of each stage as it runs, once per seed; of an older version as they stand."""
    try:
        recipe = expand_seeds(Recipe.model_validate_json(json.dumps(plain), strict=True))
    except ValidationError:
        return [(str(stage["name"]), str(stage["kind"]), set()) for stage in plain["stages"]]
    return [(stage.name, stage.kind, upstream(stage)) for stage in recipe.stages]


def _done(place: Path, sources: Mapping[str, str | None]) -> dict[str, Any] | None:
    """Return the `done.json` of a finished stage; None unless it was made from the sources as they are now."""
    if not os.path.lexists(place / DONE):
        return None
    done = read_done(place / DONE)
    made_from = done["content"].get("upstream", {})
    return done if all(key and made_from.get(name, key) == key for name, key in sources.items()) else None


def _stage(
    name: str,
    place: Path,
    kind: str,
    done: Mapping[str, Any] | None,
    first: bool,
    alive: bool,
    record: RunRecord | None,
) -> StageStatus:
    if not place.is_dir() or (done is None and (not first or os.path.lexists(place / DONE))):
        return StageStatus(name, kind, "waiting")
    progress, metrics = read_progress(place), last_metrics(place / METRICS)
    step = int(metrics["step"]) if "step" in metrics else None
    shown = {metric: value for metric, value in metrics.items() if metric not in ("step", "time")}
    if done is not None:
        seconds = done.get("cost", {}).get("seconds")
        total = progress.total if progress else step
        return StageStatus(name, kind, "done", "", total, total, shown, seconds)
    saved = checkpoint.states(place / STATES)
    saved_step = checkpoint.step_of(saved[-1]) if saved else None
    if progress and not alive:  # the file is written once a second, a state whenever a run ends
        progress = replace(progress, step=max(progress.step, min(saved_step or 0, progress.total)))
    state: StageState = "failed" if record and record.outcome == "failed" else "interrupted"
    return StageStatus(
        name=name,
        kind=kind,
        state="running" if alive else state,
        label=progress.label if progress else "",
        step=progress.step if progress else step,
        total=progress.total if progress else None,
        metrics=shown,
        elapsed=time.time() - progress.began if progress and alive else None,
        rest=progress.rest if progress and alive else None,
        saved_step=saved_step,
        saved_age=_age(saved[-1]) if saved else None,
    )


def _age(folder: Path) -> float | None:
    try:
        return time.time() - folder.stat().st_mtime
    except FileNotFoundError:
        return None  # the run has just replaced it


def _run_state(undone: bool, alive: bool, record: RunRecord | None) -> RunState:
    if alive:
        return "running"
    if not undone:
        return "done"
    if record is None:
        return "new"
    return "failed" if record.outcome == "failed" else "interrupted"


def _error(record: RunRecord | None, alive: bool, undone: bool) -> str:
    if record is None or alive:
        return ""
    if not undone:
        return record.error if record.outcome == "failed" else ""  # damage is found out by a run alone
    if record.outcome == "running":
        return f"process {record.pid} on {record.host} is gone without a word: killed, or the machine stopped"
    return record.error


def render_status(status: RunStatus) -> RenderableType:
    """Return the status for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.text import Text

    from rlhf.tables import WholeTable

    table = WholeTable(
        "stage", "state", "step", "time", "rest", "saved", "last metrics", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for stage in status.stages:
        saved = "" if stage.saved_step is None else f"{stage.saved_step}, {duration(stage.saved_age or 0.0)} ago"
        rest = "" if stage.rest is None else duration(stage.rest)
        name = stage.name if stage.name == stage.kind else f"{stage.name} ({stage.kind})"
        elapsed = "" if stage.elapsed is None else duration(stage.elapsed)
        state = f"not run: {stage.behind} failed" if stage.behind else stage.state
        cells = (name, state, _steps(stage), elapsed, rest, saved, brief(_finite(stage.metrics or {})))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return Group(*(Text(visible(line)) for line in _headlines(status)), table)


def _headlines(status: RunStatus) -> list[str]:
    where = f", process {status.pid} on {status.host}" if status.pid else ""
    elapsed = "" if status.elapsed is None else f", {duration(status.elapsed)}"
    lines = [f"{status.name}: {status.state}{elapsed}{where if status.alive else ''}; {status.folder}"]
    if status.error:
        lines.append(f"last error: {status.error.splitlines()[0]}")
    damaged = any(stage.state == "damaged" for stage in status.stages)
    if status.state == "interrupted" and not damaged:
        lines.append("the same `rlhf run` goes on where it was")
    if status.state == "failed" and not damaged:
        lines.append("once that is mended, the same `rlhf run` goes on where it was; what was finished before is kept")
    return lines


def _steps(stage: StageStatus) -> str:
    if stage.step is None:
        return ""
    counted = f"{stage.step}/{stage.total}" if stage.total else f"{stage.step}"
    return f"{counted} {stage.label}".strip()


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
