"""Pieces of a growing text have the ids that encoding the whole text each time would give them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from chat_templates import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.models.pieces import Pieces
from rlhf.models.tokenizer import ChatTokenizer, load_tokenizer

WORDS = ["a", " b", "\n", "\n\n", "  ", "so", "Yes.", "é", "🙂", "<|im_end|>", "<|im_start|>", "<", "|im_end|>", "123"]


def whole_each_time(pieces: list[str], encode) -> list[list[int]]:
    """The definition, with one encoding of the whole text for each piece."""
    encoded, text, ids = [], "", []
    for piece in pieces:
        text += piece
        whole = encode(text)
        encoded.append(whole[len(ids) :] if whole[: len(ids)] == ids else encode(piece))
        ids = ids + encoded[-1]
    return encoded


def texts(random_: random.Random, marks: list[str]) -> list[str]:
    return ["".join(random_.choices([*WORDS, *marks], k=random_.randint(0, 6))) for _ in range(random_.randint(1, 7))]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_pieces_are_those_of_the_whole_text(family: str) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    marks = [*FAMILIES[family].special, *FAMILIES[family].plain]
    random_ = random.Random(family)
    for _ in range(150):
        pieces = texts(random_, marks)
        assert tokenizer.pieces.of(pieces) == whole_each_time(pieces, tokenizer.controls.encode), pieces


@pytest.mark.real_model
def test_pieces_are_those_of_the_whole_text_with_real_merges(real_folder: Path) -> None:
    tokenizer = load_tokenizer(real_folder)
    random_ = random.Random(0)
    for _ in range(300):
        pieces = texts(random_, ["<|im_start|>assistant\n", "<|im_end|>\n"])
        assert tokenizer.pieces.of(pieces) == whole_each_time(pieces, tokenizer.controls.encode), pieces


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_tokenizer_that_begins_texts_in_its_own_way(scheme: str) -> None:
    """SentencePiece models put a blank before a text, or before all that follows a special token."""
    vocabulary = [*"▁abcdefghijklmnopqrstuvwxyz.<|>_", "▁a", "ab", "▁so"]
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -len(piece) / 2) for piece in vocabulary)], 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    random_ = random.Random(scheme)

    def encode(text: str) -> list[int]:
        return hf(text, add_special_tokens=False)["input_ids"]

    for _ in range(300):
        pieces = [
            "".join(random_.choices(["a", " ab", "so", ".", "</s>", " "], k=random_.randint(0, 5))) for _ in range(5)
        ]
        assert Pieces(hf, encode).of(pieces) == whole_each_time(pieces, encode), pieces


def test_what_came_before_the_last_special_token_is_not_encoded_again(tiny_tokenizer: ChatTokenizer) -> None:
    seen = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return tiny_tokenizer.controls.encode(text)

    turns = ["<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "So.<|im_end|>"] * 40
    Pieces(tiny_tokenizer.hf, encode).of(turns)
    assert max(seen) < len("".join(turns[:4]))


def test_several_responses_have_the_ids_of_one(tiny_tokenizer: ChatTokenizer) -> None:
    asked = [{"role": "user", "content": "Why? <|im_end|>"}]
    said = ["So.", "\n\n", "<|im_start|>user", ""]
    prompt, answers = tiny_tokenizer.completion_pair_ids(asked, said)
    assert [(prompt, ids) for ids in answers] == [tiny_tokenizer.completion_ids(asked, text) for text in said]


def test_the_identity_of_a_tokenizer_follows_its_merges(tiny_folder: Path) -> None:
    """Two tokenizers with one vocabulary and one template may still encode texts otherwise."""
    one, other = load_tokenizer(tiny_folder), load_tokenizer(tiny_folder)
    assert one.identity() == other.identity()
    other.hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert one.fingerprint() == other.fingerprint()
    assert one.identity() != other.identity()


def test_a_tokenizer_that_was_told_to_cut_still_encodes_whole_texts(tiny_folder: Path) -> None:
    """The backend remembers the last call's truncation, and splits special tokens where the tokenizer does."""
    tokenizer = load_tokenizer(tiny_folder)
    text = "<|im_start|>user\nWhy is that so?<|im_end|>"
    whole = tokenizer.hf(text, add_special_tokens=False)["input_ids"]
    tokenizer.hf("something long", truncation=True, max_length=3)
    assert tokenizer.hf.backend_tokenizer.truncation is not None
    assert tokenizer.controls.encode(text) == whole
    tokenizer.hf.split_special_tokens = True
    assert tokenizer.controls.encode(text) == tokenizer.hf(text, add_special_tokens=False)["input_ids"] != whole
