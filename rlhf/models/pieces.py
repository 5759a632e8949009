"""The ids of a text that grows piece by piece, without encoding again what came before.

Tokenizers cut a text at its special tokens before they do anything else, so what follows one is encoded alike with or
without the text before that token. An encoding therefore begins at the last of them that the text so far holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prefix:
    """A text and its ids so far.

    anchor, before  where its last special token begins, in characters and in ids; 0 where there is none
    whole           whether the ids are those of the text in one
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    anchor: int = 0
    before: int = 0
    whole: bool = True


class Pieces:
    """Encodes pieces of one text as a model meets them: the ids of a piece never depend on a later piece.

    They are those of the whole text, unless a token would cross from one piece to the next.
    """

    def __init__(self, hf: PreTrainedTokenizerBase, encode: Callable[[str], list[int]]) -> None:
        added = hf.added_tokens_decoder if hf.is_fast else {}
        self.encode = encode
        self.anchors = {
            token.content: number
            for number, token in added.items()
            if token.special and not (token.normalized or token.single_word or token.lstrip or token.rstrip)
        }
        spelled = sorted((token.content for token in added.values()), key=len, reverse=True)
        self._numbers = frozenset(self.anchors.values())
        self._added = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")

    def of(self, pieces: Sequence[str]) -> list[list[int]]:
        """Return the ids of each piece."""
        found, prefix = [], Prefix()
        for piece in pieces:
            ids, prefix = self.follow(prefix, piece)
            found.append(ids)
        return found

    def follow(self, prefix: Prefix, piece: str) -> tuple[list[int], Prefix]:
        """Return the ids of a piece that comes after a text, and the text with the piece."""
        text = prefix.text + piece
        known = list(prefix.ids[prefix.before :])
        encoded = self.encode(text[prefix.anchor :])
        alike = encoded[: len(known)] == known
        new = encoded[len(known) :] if alike else self.encode(piece)
        ids = (*prefix.ids, *new)
        if not (alike and prefix.whole):  # from here on only the text in one tells what its ids would be
            return new, Prefix(text, ids, whole=False)
        return new, Prefix(text, ids, *self._anchor(text, ids, prefix))

    def _anchor(self, text: str, ids: Sequence[int], prefix: Prefix) -> tuple[int, int]:
        """Return where the last special token begins, in the text and in the ids."""
        last = next((place for place in range(len(ids) - 1, prefix.before, -1) if ids[place] in self._numbers), None)
        found = None
        for match in self._added.finditer(text, prefix.anchor):
            found = match if match[0] in self.anchors else found
        if last is None or found is None or self.anchors[found[0]] != ids[last]:
            return prefix.anchor, prefix.before
        return found.start(), last
