"""What may leave the machine of a run: no absolute path, no home folder, and of a URL neither user nor query."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit

URL = re.compile(r"\b(?!tiny:)[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
QUOTED = re.compile(r"""(['"])(/[^'"\n]+)\1""")
SHORTEST_HOME = 3
"""Characters: a home folder such as `/` is in every path."""


def public(value: Any) -> Any:
    """Return plain values (mappings, lists, texts, numbers) with every text in them, and every key, made public."""
    match value:
        case str():
            return public_text(value)
        case Path():
            return public_text(str(value))
        case Mapping():
            return {public(key): public(item) for key, item in value.items()}
        case list() | tuple():
            return [public(item) for item in value]
    return value


def public_text(text: str) -> str:
    """Return a text that says nothing of the machine or of an endpoint's keys.

    A text that is a path, absolute or out of a folder (`../`), keeps its last part, and so does an absolute path in
    quotes. Elsewhere URLs lose user, password, query and fragment, and the
    home folder is written `~`.
    """
    if _is_path(text):
        return PurePosixPath(text).name
    shown = URL.sub(lambda found: _public_url(found[0]), text)
    shown = QUOTED.sub(lambda found: f"{found[1]}{PurePosixPath(found[2]).name}{found[1]}", shown)
    home = str(Path.home())
    return shown.replace(home, "~") if len(home) >= SHORTEST_HOME else shown


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~/", "../")) and "\n" not in text and not text.isspace()


def _public_url(url: str) -> str:
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(a URL)"
    if parts.scheme == "file":
        return PurePosixPath(parts.path).name
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
