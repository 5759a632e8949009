"""What every benchmark does around its measurement: read its command line, and give its figures as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that knows `--json FILE`; a benchmark adds what else it takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, not to the console")
    return parser


def give(figures: Any, out: Path | None) -> None:
    """Write figures as JSON to a file, or print them."""
    text = json.dumps(figures, indent=2)
    if out:
        out.write_text(text + "\n")
    else:
        print(text)
