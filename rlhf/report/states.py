"""What a run folder keeps to go on from: its states and finished models, as a table and checked."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.checkpoint import QUARANTINE, problems, states
from rlhf.done_file import damage, read_done
from rlhf.errors import DataError
from rlhf.manifest import shown
from rlhf.stage_places import DONE, STAGES, STATES, folder_bytes, stage_of

if TYPE_CHECKING:
    from rich.table import Table

UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@dataclass(frozen=True)
class Check:
    """How many states and models of a run are as they were written, and each difference in one line."""

    states: int
    models: int
    problems: list[str]


def states_table(run: Path) -> Table | None:
    """Return one row per state of every stage, oldest first, each one verified; None when there is none."""
    from rich.text import Text

    from rlhf.tables import WholeTable

    table = WholeTable("stage", "step", "age", "MiB", "state", title=Text(f"states in {shown(str(run))}"))
    for column in table.columns[1:4]:
        column.justify = "right"
    for folder in _all_states(run):
        try:
            age, size = _age(time.time() - folder.stat().st_mtime), _mebibytes(folder)
        except FileNotFoundError:
            continue  # a running job has just removed it
        cells = (stage_of(folder.parent.parent), str(_step(folder)), age, size, _verdict(folder))
        table.add_row(*(Text(shown(cell)) for cell in cells))
    return table if table.rows else None


def check_run(run: Path) -> Check:
    """Compare every state of a run, and all that `done.json` seals, kept stages too, with their hashes."""
    found: list[str] = []
    whole, models = 0, 0
    for folder in (folder for root in sorted(run.glob(f"{STAGES}/*/{STATES}")) for folder in states(root)):
        wrong = problems(folder)
        if folder.exists():  # unless a running job has just removed it
            whole += not wrong
            found += [f"{shown(str(folder.relative_to(run)))}/{line}" for line in wrong]
    for file in sorted(run.glob(f"{STAGES}/*/{DONE}")):
        place = shown(str(file.parent.relative_to(run)))
        try:
            wrong = damage(file.parent, read_done(file))
        except DataError:
            wrong = [f"{DONE}: truncated or damaged"]
        if file.exists():  # unless a running job has just replaced it
            models += (file.parent / "model").is_dir() and not wrong
            found += [f"{place}/{line}" for line in wrong]
    return Check(whole, models, found)


def _all_states(run: Path) -> list[Path]:
    found: list[Path] = []
    for root in sorted(run.glob(f"{STAGES}/*/{STATES}")):
        aside = [folder for folder in root.glob(f"{QUARANTINE}*") if folder.is_dir()]
        found += sorted([*states(root), *aside], key=lambda folder: (_step(folder), folder.name))
    return found


def _step(folder: Path) -> int:
    digits = folder.name.removeprefix(QUARANTINE).removeprefix("step-").split("-")[0]
    return int(digits) if digits.isdecimal() else 0


def _verdict(folder: Path) -> str:
    if folder.name.startswith(QUARANTINE):
        return "quarantined"
    wrong = problems(folder)
    more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{wrong[0]}{more}" if wrong else "valid"


def _age(seconds: float) -> str:
    for length, unit in UNITS:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"


def _mebibytes(folder: Path) -> str:
    return f"{folder_bytes(folder) / 2**20:,.1f}"
