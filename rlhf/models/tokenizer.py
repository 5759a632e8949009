"""The one place that knows chat templates, end-of-sequence, padding and masks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rlhf.errors import DataError, RecipeError
from rlhf.models.controls import Controls
from rlhf.models.folder import loading
from rlhf.models.pieces import Pieces, Prefix
from rlhf.models.rendering import Message, render

PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template.

    What messages say is text: a control token that they spell is encoded letter by letter, and only what the template
    writes itself becomes one (`Controls`).

    hf       the transformers tokenizer
    pad_id   fills rows up; masks never rely on it
    eos_ids  tokens that end a response; the first one is what the template closes an assistant turn with
    """

    hf: PreTrainedTokenizerBase
    pad_id: int
    eos_ids: tuple[int, ...]

    @cached_property
    def controls(self) -> Controls:
        """The control tokens, and how texts are kept from becoming them."""
        return Controls(self.hf, self.eos_ids)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that a response to `messages` follows: the template with its generation prompt.

        A beginning-of-sequence token is there when the template writes one, and never twice. Raises DataError
        when the template refuses the messages.
        """
        return self.controls.encode(self._render(messages, generation_prompt=True))

    def completion_ids(self, messages: Sequence[Message], response: str) -> tuple[list[int], list[int]]:
        """Return the prompt's ids and those of a finished response to it, end-of-sequence token included."""
        pieces = [self._render(messages, generation_prompt=True), self.controls.masked(response, "assistant")]
        prompt, completion = self.pieces.of(pieces)
        return prompt, [*completion, self.eos_ids[0]]

    def conversation_ids(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return a conversation's ids and a mask that is True on what the assistant says.

        The end-of-sequence token that closes a turn is its last True; a newline that the template puts after it
        is False. What precedes an assistant's turn has the ids of `prompt_ids`. Raises DataError when the
        template shows earlier turns differently later on, so that no one sequence serves all turns.
        """
        texts, spoken = zip(*self._turns(messages), strict=True)
        ids: list[int] = []
        mask: list[bool] = []
        for piece, assistant in zip(self.pieces.of(texts), spoken, strict=True):
            ids += piece
            mask += [assistant] * len(piece)
        return ids, mask

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a plain text, with the special tokens that the tokenizer itself puts around one."""
        return self.controls.encode(self.controls.masked(text, "user"), around=True)

    def spelled_controls(self, text: str, role: str = "user") -> tuple[str, ...]:
        """Return the control tokens that a text of a role spells, in their order; it is encoded as its letters."""
        return self.controls.spelled(text, role)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` without special tokens."""
        return self.hf.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def fingerprint(self) -> str:
        """Return a hash of vocabulary and template; equal ones encode conversations alike."""
        content = json.dumps([sorted(self.hf.get_vocab().items()), self.hf.get_chat_template(), self.eos_ids])
        return hashlib.sha256(content.encode()).hexdigest()

    def _render(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        return render(self.hf, self.controls, messages, generation_prompt)

    def _turns(self, messages: Sequence[Message]) -> Iterator[tuple[str, bool]]:
        """Cut the rendered conversation into pieces, each with whether the assistant said it."""
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], generation_prompt=True)
            turn = self._rest(before, self._render(messages[: index + 1]))
            end = self._turn_end(turn)
            yield self._rest(done, before), False
            yield turn[:end], True
            done = before + turn[:end]
        yield self._rest(done, self._render(messages)), False

    def _rest(self, start: str, text: str) -> str:
        if not text.startswith(start):
            shown = self.controls.unmasked(start)[-60:]
            raise DataError(
                "the chat template changes earlier turns when later ones follow, so a conversation has no one token "
                f"sequence: {shown!r} is not kept; use single-turn data, or a template that keeps what it wrote"
            )
        return text[len(start) :]

    def _turn_end(self, turn: str) -> int:
        """Return where the last end-of-sequence token of an assistant's rendered turn ends, in characters."""
        ends = self.hf.convert_ids_to_tokens(list(self.eos_ids))
        end = max(turn.rfind(token) + len(token) if token in turn else 0 for token in ends)
        if not end:
            shown = self.controls.unmasked(turn)[-60:]
            raise DataError(
                f"the chat template closes the assistant's turn {shown!r} with none of {', '.join(ends)}; "
                "set model.chat_template to one that does, or the model never learns to stop"
            )
        return end

    @cached_property
    def pieces(self) -> Pieces:
        """Encodes texts that grow."""
        return Pieces(self.hf, self.controls.encode)

    def completion_pair_ids(
        self, messages: Sequence[Message], responses: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Return what `completion_ids` does of each of several responses to one prompt, which is encoded once."""
        prompt, prefix = self.pieces.follow(Prefix(), self._render(messages, generation_prompt=True))
        said = [self.controls.masked(response, "assistant") for response in responses]
        return prompt, [[*self.pieces.follow(prefix, text)[0], self.eos_ids[0]] for text in said]

    def identity(self) -> str:
        """Return a hash of all that bears on ids: the tokenizer's algorithm too, beside vocabulary and template."""
        model = self.hf.backend_tokenizer.to_str() if self.hf.is_fast else repr(self.hf)
        return hashlib.sha256(f"{self.fingerprint()}\n{type(self.hf).__name__}\n{model}".encode()).hexdigest()


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """Load a folder's tokenizer and settle which tokens pad and end, and that the template uses them.

    Raises RecipeError when there is no chat template, no end-of-sequence token, or when the template does not
    close an assistant's turn with one: a model trained so would never stop.
    """
    with loading(folder):
        hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not hf.chat_template:
        raise RecipeError(f"{folder}: the tokenizer has no chat template; set model.chat_template to a Jinja file")
    eos_ids = _end_ids(hf, folder)
    if not eos_ids:
        raise RecipeError(
            f"{folder}: the tokenizer names no end-of-sequence token (eos_token in tokenizer_config.json)"
        )
    with loading(folder):
        closing = _closing_id(ChatTokenizer(hf, pad_id=eos_ids[0], eos_ids=eos_ids))
    eos_ids = (closing, *(token for token in eos_ids if token != closing))
    pad_id = _pad_id(hf, eos_ids)
    hf.pad_token = hf.convert_ids_to_tokens(pad_id)
    return ChatTokenizer(hf, pad_id, eos_ids)


def _end_ids(hf: PreTrainedTokenizerBase, folder: Path) -> tuple[int, ...]:
    """Return the tokenizer's end-of-sequence token and those of the generation config, each once."""
    found = [hf.eos_token_id]
    if (folder / "generation_config.json").is_file():
        with loading(folder):
            listed = GenerationConfig.from_pretrained(folder).eos_token_id
        found += listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _closing_id(tokenizer: ChatTokenizer) -> int:
    """Return the token that ends an assistant's turn in a trial conversation."""
    trial = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]
    try:
        ids, mask = tokenizer.conversation_ids(trial)
    except DataError as error:
        raise RecipeError(f"model.chat_template: a trial conversation fails: {error}") from error
    return [token for token, spoken in zip(ids, mask, strict=True) if spoken][-1]


def _pad_id(hf: PreTrainedTokenizerBase, eos_ids: tuple[int, ...]) -> int:
    """Return the tokenizer's own pad token unless it also ends sequences; else a token no text uses; else the end."""
    if hf.pad_token_id is not None and hf.pad_token_id not in eos_ids:
        return hf.pad_token_id
    vocabulary = hf.get_vocab()
    free = (vocabulary[name] for name in PAD_CANDIDATES if name in vocabulary and vocabulary[name] not in eos_ids)
    return next(free, eos_ids[0])
