"""Text that a model, a data file, a server or a secret may be in, made safe to look at."""

from __future__ import annotations

import logging
import os
import re
import unicodedata

# Other, control / format / surrogate / private use / unassigned; separators of lines and paragraphs.
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# Line breaks and tabs are layout; the joiners shape emoji and many scripts and reorder nothing.
HARMLESS = {"\n", "\t", "\u200c", "\u200d"}
SECRET_NAME = re.compile(r"(^|_)(TOKEN|API_?KEY|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
LOCATION = re.compile(r"_(PATH|FILE|DIR|ID)$", re.IGNORECASE)
SHORTEST = 8
"""Characters of a secret: shorter values would blot out ordinary words."""

_read: set[str] = set()


def visible(text: str, limit: int | None = 4000) -> str:
    """Spell out characters that act instead of showing, as <U+202E>, and cut the text after `limit` characters.

    This covers escape sequences for terminals, text-direction overrides (Boucher & Anderson 2021), zero-width
    and tag characters and lone surrogates. It does not escape HTML: that is the template's part.
    """
    if text.isprintable() and (limit is None or len(text) <= limit):
        return text
    shown = "".join(
        f"<U+{ord(letter):04X}>" if letter not in HARMLESS and unicodedata.category(letter) in HIDDEN else letter
        for letter in text[:limit]
    )
    cut = 0 if limit is None else len(text) - limit
    return f"{shown} ... ({cut} more characters)" if cut > 0 else shown


def keep_secret(value: str) -> None:
    """Have `redacted` know a secret that was read from a variable of any name."""
    _read.add(value)


def redacted(text: str) -> str:
    """Return the text with *** in place of secrets: what `keep_secret` was told, and variables with a secret's name."""
    named = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and not LOCATION.search(name)}
    for secret in sorted((value.strip() for value in named | _read), key=len, reverse=True):
        if len(secret) >= SHORTEST:
            text = text.replace(secret, "***")
    return text


def printable(text: str, limit: int | None = None) -> str:
    """Return a text for a terminal or a log: without secrets, and with nothing in it that acts."""
    return visible(redacted(text), limit)


def echo(text: str, err: bool = False, nl: bool = True) -> None:
    """Print a text, made `printable`, to the output or the error stream: the one way past rich to a terminal."""
    import click

    click.echo(printable(text), err=err, nl=nl)


class PrintableRecords(logging.Filter):
    """Makes the records of a logger `printable`, tracebacks too, whatever handler shows them."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through, its text made safe."""
        record.msg, record.args = printable(record.getMessage()), ()
        if record.exc_info:
            record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
        return True


class PrintableFormatter(logging.Formatter):
    """Formats records, tracebacks too, as `printable` text."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of a record."""
        return printable(super().format(record))
