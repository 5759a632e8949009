"""The elements of a JSON array that is a whole file, one after the other, with little of the file in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator

from rlhf.errors import DataError

WINDOW = 1 << 16
"""Characters that are read at once and, beyond one element, kept at most twice over."""

NEAR = 16
"""What is found this close to the end of what has been read may be otherwise once more is there."""


def array_items(pieces: Iterator[str], file: str) -> Iterator[tuple[int, str]]:
    """Yield (line, source text) of each element of the array that all pieces of text are together."""
    text = _Window(pieces, file)
    if not text.skip_space():
        return
    if text.next() != "[":
        raise DataError(f"{text.where()}: a .json file must hold an array of objects")
    text.take(1)
    while (text.skip_space() and text.next() != "]") or not text.next():
        yield text.line, text.element()
        text.skip_space()
        if text.next() == ",":
            text.take(1)
        elif text.next() != "]":
            raise DataError(f"{text.where()}: malformed JSON: expected ',' or ']' between rows")
    text.take(1)
    if text.skip_space():
        raise DataError(f"{text.where()}: malformed JSON: text after the array")


class _Window:
    """What has been read and not yet taken of a text, with the line and column at which it begins."""

    def __init__(self, pieces: Iterator[str], file: str) -> None:
        self.pieces, self.file = pieces, file
        self.text, self.at = "", 0
        self.line, self.column = 1, 1
        self.whole = False
        self.decoder = json.JSONDecoder()

    def next(self) -> str:
        """Return the next character; "" at the end."""
        return self.text[self.at : self.at + 1]

    def where(self) -> str:
        """Return the place in the file."""
        return f"{self.file}:{self.line}"

    def take(self, length: int) -> str:
        """Return the next characters and go past them."""
        taken = self.text[self.at : self.at + length]
        lines = taken.count("\n")
        self.column = length - taken.rfind("\n") if lines else self.column + length
        self.line += lines
        self.at += length
        if self.at > WINDOW:
            self.text, self.at = self.text[self.at :], 0
        return taken

    def skip_space(self) -> bool:
        """Go past white space, and return whether anything follows."""
        while True:
            rest = len(self.text) - self.at
            blank = next((place for place in range(rest) if self.text[self.at + place] not in " \t\r\n"), rest)
            self.take(blank)
            if blank < rest:
                return True
            if not self.read():
                return False

    def read(self) -> bool:
        """Read as much again as there is; False where nothing is left."""
        wanted, parts = max(WINDOW, len(self.text) - self.at), []
        while wanted > 0 and not self.whole:
            piece = next(self.pieces, None)
            self.whole = piece is None
            parts.append(piece or "")
            wanted -= len(parts[-1])
        self.text = self.text[self.at :] + "".join(parts)
        self.at = 0
        return any(parts)

    def element(self) -> str:
        """Return the source text of the value that comes next, and go past it."""
        while True:
            try:
                _, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - NEAR
                malformed = self._malformed(error)
                if cut and self.read():
                    continue
                raise malformed from error
            except RecursionError as error:
                raise DataError(f"{self.where()}: JSON is nested too deeply") from error
            length = end - self.at
            if end < len(self.text) - NEAR or not self.read():  # half a number is a number too
                return self.take(length)

    def _malformed(self, error: json.JSONDecodeError) -> DataError:
        before = self.text[self.at : error.pos]
        lines = before.count("\n")
        column = len(before) - before.rfind("\n") if lines else self.column + len(before)
        return DataError(f"{self.file}:{self.line + lines}: malformed JSON: {error.msg} at column {column}")
