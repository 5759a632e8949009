"""One thing that was looked at, and how all of them are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from rich.text import Text

from rlhf.errors import ResourceError
from rlhf.terminal import Terminal
from rlhf.untrusted import echo, visible

COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Check:
    """`fail`: a run will not work; `warn`: it may be slow, unsafe or run out of something. `remedy` says what to do."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def print_checks(checks: Sequence[Check], as_json: bool) -> int:
    """Print a line for each check and one for its remedy; return the exit code, 4 when one failed."""
    failed = sum(check.state == "fail" for check in checks)
    if as_json:
        echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        console = Terminal()
        for check in checks:
            line = Text(f"{check.state:<5}", style=COLOURS[check.state]) + Text(f"{check.name:<14}", style="not bold")
            console.print(line + Text(visible(check.found)), soft_wrap=True)
            if check.remedy:
                console.print(Text(f"{'':19}-> {visible(check.remedy)}"), soft_wrap=True)
        warned = sum(check.state == "warn" for check in checks)
        console.print(f"{len(checks)} checks, {warned} warnings, {failed} failed")
    return ResourceError.exit_code if failed else 0
