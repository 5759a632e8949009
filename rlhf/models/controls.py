"""Text that spells a control token, told apart from the control tokens that a chat template writes.

A chat template returns one string, and `<|im_end|>` in it is the end of a turn whoever wrote it. So before a message
reaches the template, each control token that it spells is masked by letters that no text can guess; what the
rendered string still spells is the template's own. Encoding turns those into control tokens, and the masked
ones into the tokens of their letters.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from rlhf.errors import DataError, RlhfError

BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)
ELEMENT = re.compile(
    r"</?(?:a|b|blockquote|body|br|caption|code|div|em|h[1-6]|head|hr|html|i|img|li|ol|p|pre|s|span|strong|su[bp]|svg"
    r"|table|tbody|td|tfoot|th|thead|tr|u|ul)>"
)
"""Elements of HTML, which some vocabularies hold whole: text, unless the chat template writes them."""

SPEECH = re.compile(r"</?[a-z_]+>", re.IGNORECASE)
"""Marks inside what an assistant says, such as `<think>` or `<tool_call>`, where the tokenizer calls them no special
token: a model says them itself, so in an assistant's text they stay tokens."""

FROM_HEX = str.maketrans("0123456789abcdef", "abcdefghijklmnop")
TO_HEX = str.maketrans("abcdefghijklmnop", "0123456789abcdef")
"""Hidden text is hexadecimal in letters that templates, normalizers and words leave as they are."""


class Controls:
    """The control tokens of a tokenizer, and texts that only spell them.

    Control tokens are its special tokens, its end-of-sequence tokens, and what else of its added vocabulary is
    written as a mark (`<|user|>`, `[INST]`, `<tool_call>`). Added words, white space and HTML stay ordinary text.
    """

    def __init__(self, hf: PreTrainedTokenizerBase, eos_ids: Collection[int]) -> None:
        template = str(hf.chat_template)
        added = hf.added_tokens_decoder
        self.hf = hf
        self.ids = {
            token.content: number
            for number, token in added.items()
            if token.special or number in eos_ids or _is_mark(token.content, template)
        }
        self.speech = {
            text
            for text, number in self.ids.items()
            if SPEECH.fullmatch(text) and not added[number].special and number not in eos_ids
        }
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._normalised = any(added[number].normalized for number in self.ids.values())
        self._mask, self._name = (_lettered(secrets.token_bytes(16)) for _ in range(2))
        self._masked = re.compile(f".{self._mask}([a-p]*)z.", re.DOTALL)

    def spelled(self, text: str, role: str = "user") -> tuple[str, ...]:
        """Return the control tokens that a text of a role spells, in their order, and which its ids never hold."""
        if not self._may_spell(text):
            return ()
        return tuple(token for _, _, token in self._found(text) if role != "assistant" or token not in self.speech)

    def masked(self, text: str, role: str) -> str:
        """Return a message's text with what it spells masked; the text itself where it spells nothing."""
        if not self._may_spell(text):
            return text
        return self._replaced(text, self._mask, self.speech if role == "assistant" else ())

    def unmasked(self, text: str) -> str:
        """Return a text with what was masked as it was."""
        return self._masked.sub(lambda found: _plain(found[1]), text) if self._mask in text else text

    def encode(self, text: str, around: bool = False) -> list[int]:
        """Return the ids of a text: control tokens where they stand open, letters where they are masked.

        A text without masks has the ids that the tokenizer itself gives it. `around` adds the special tokens that the
        tokenizer puts around a text. Raises DataError where the tokenizer refuses the text, or has no `tokenizer.json`
        and so cannot keep the two apart.
        """
        with _encoding():
            if self._mask not in text:
                if self.hf.is_fast and self._is_bare:
                    return self._backend.encode(text, add_special_tokens=around).ids
                ids: list[int] = self.hf(text, add_special_tokens=around)["input_ids"]
                return ids
            named = self._replaced(text, self._name, ())
            return self._literal.encode(self.unmasked(named), add_special_tokens=around).ids

    def _may_spell(self, text: str) -> bool:
        if self._pattern.search(text):
            return True
        normalizer = self._backend.normalizer if self._normalised and self.hf.is_fast else None
        return normalizer is not None and bool(self._pattern.search(normalizer.normalize_str(text)))

    def _found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Yield where the tokenizer itself puts control tokens: start, end, token, without white space around.

        A token for what it does not know is one that no text has spelled there.
        """
        if not self.hf.is_fast:
            for match in self._pattern.finditer(text):
                yield *match.span(), match[0]
            return
        texts = {number: token for token, number in self.ids.items()}
        with _encoding():
            found = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        for number, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True):
            piece = text[start:end]
            if number in texts and self._may_spell(piece):
                yield start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip()), texts[number]

    def _replaced(self, text: str, kind: str, kept: Collection[str]) -> str:
        """Return a text with its control tokens hidden: masks keep how they are written, names which they are."""
        done, pieces = 0, []
        for start, end, token in self._found(text):
            if token not in kept:
                hidden = token if kind == self._name else text[start:end]
                pieces += [text[done:start], _hidden(kind, hidden)]
                done = end
        return "".join([*pieces, text[done:]])

    @property
    def _backend(self) -> Tokenizer:
        backend: Tokenizer = self.hf.backend_tokenizer
        return backend

    @property
    def _is_bare(self) -> bool:
        """Whether the backend by itself gives the ids that the tokenizer around it does, in half the time."""
        backend = self._backend
        cut = backend.truncation is not None or backend.padding is not None
        return not cut and backend.encode_special_tokens == bool(self.hf.split_special_tokens)

    @cached_property
    def _literal(self) -> Tokenizer:
        """A tokenizer whose control tokens have private names, so that a text that spells one is only letters."""
        if not self.hf.is_fast:
            raise DataError(
                "a text spells a control token, and this tokenizer, which has no tokenizer.json, cannot encode it as"
                " text; remove it from the data, or use a model with a tokenizer.json"
            )
        described = json.loads(self._backend.to_str())
        described["truncation"] = described["padding"] = None
        names = {token: _hidden(self._name, token) for token in self.ids}
        for token in described["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        _rename(described["model"], names)
        return Tokenizer.from_str(json.dumps(described))


@contextmanager
def _encoding() -> Iterator[None]:
    """Make what a tokenizer raises about a text (a lone surrogate, a piece that it lacks) a DataError."""
    try:
        yield
    except RlhfError:
        raise
    except Exception as error:  # tokenizers raises plain ones
        raise DataError(f"the tokenizer refuses a text: {type(error).__name__}: {error}") from error


def _is_mark(token: str, template: str) -> bool:
    return bool(BRACKETED.fullmatch(token)) and (not ELEMENT.fullmatch(token) or token in template)


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Give control tokens that a model's own vocabulary holds their names there too: no merge or piece may end in one.

    The vocabulary is a dict, or a list of (piece, score).
    """
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]


def _touches(merge: str | list[str], names: dict[str, str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def _hidden(kind: str, text: str) -> str:
    """Return a stand-in for a text, between its own first and last characters, next to which words begin and end."""
    return f"{text[0]}{kind}{_lettered(text.encode('utf-8', 'surrogatepass'))}z{text[-1]}"


def _lettered(content: bytes) -> str:
    return content.hex().translate(FROM_HEX)


def _plain(letters: str) -> str:
    return bytes.fromhex(letters.translate(TO_HEX)).decode("utf-8", "surrogatepass")
