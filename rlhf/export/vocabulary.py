"""A tokenizer as GGUF keeps it: tokens with their types, merges or scores, and the name of how text is split."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from rlhf.errors import RecipeError
from rlhf.export.agreement import PROBES
from rlhf.models.tokenizer import ChatTokenizer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o")
"""Names that llama.cpp has for ways to split text before merging, told by a pattern."""


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: ChatTokenizer, size: int) -> None:
    """Write everything about the tokenizer to the metadata of a GGUF file; the model has `size` embeddings.

    Two kinds are known: byte-level BPE (`gpt2`) and SentencePiece's BPE with byte fallback (`llama`). Raises
    RecipeError for another, or where llama.cpp has no name for how the text is split.
    """
    hf = tokenizer.hf
    described = json.loads(hf.backend_tokenizer.to_str())
    kind, pre = _kind(described), "default"
    if kind == "gpt2":
        pre = _split_name(hf)
        writer.add_token_merges([_joined(merge) for merge in described["model"]["merges"]])
    names = _names(hf, size)
    types = list(_types(hf, names, size))
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([names.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(types)
    if kind == "llama" or not described["model"]["merges"]:
        writer.add_token_scores(_scores(names, described["model"]["merges"], size))
    _write_special(writer, tokenizer)
    if kind == "llama":
        writer.add_add_space_prefix(_adds_space(hf))
    if hf.chat_template:
        writer.add_chat_template(hf.get_chat_template())


def _kind(described: dict[str, Any]) -> str:
    model, decoder = described["model"], described.get("decoder") or {}
    parts = [decoder.get("type"), *(part.get("type") for part in decoder.get("decoders", ()))]
    if model["type"] == "BPE" and "ByteLevel" in parts:
        return "gpt2"
    if model["type"] == "BPE" and model.get("byte_fallback"):
        return "llama"
    raise RecipeError(
        f"its tokenizer is {model['type']} with decoders {', '.join(map(str, parts))}: GGUF export knows byte-level BPE"
        " and SentencePiece's BPE with byte fallback"
    )


def _split_name(hf: PreTrainedTokenizerBase) -> str:
    """Return llama.cpp's name for a way to split text that gives the tokenizer's own tokens on the probes.

    The tokenizer's very own way is preferred to another that happens to do the same.
    """
    wanted = [hf(text, add_special_tokens=False)["input_ids"] for text in PROBES]
    own = _form(hf.backend_tokenizer)
    fitting = []
    for name, split in _candidates():
        other = Tokenizer.from_str(hf.backend_tokenizer.to_str())
        other.pre_tokenizer = split
        if [other.encode(text, add_special_tokens=False).ids for text in PROBES] == wanted:
            fitting.append((_form(other) != own, name))
    if not fitting:
        raise RecipeError(
            "its tokenizer splits text in a way that GGUF export has no name for: it knows gpt-2, smollm,"
            f" {', '.join(SPLITS)}"
        )
    return min(fitting, key=lambda found: found[0])[1]


def _form(tokenizer: Tokenizer) -> str:
    """Return how a tokenizer splits text, as JSON, without what changes offsets alone."""
    return re.sub(r'"trim_offsets": \w+', "", json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"]))


def _candidates() -> Iterator[tuple[str, Any]]:
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spaced = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    yield "gpt-2", spaced
    yield "smollm", pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), spaced])
    for name in SPLITS:
        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated")
        yield name, pre_tokenizers.Sequence([split, bytewise])


def _names(hf: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    names = {index: token for token, index in hf.get_vocab().items()}
    if names and max(names) >= size:
        raise RecipeError(f"its tokenizer has ids up to {max(names)}, but the model has {size} embeddings")
    return names


def _types(hf: PreTrainedTokenizerBase, names: dict[int, str], size: int) -> Iterator[gguf.TokenType]:
    added = hf.added_tokens_decoder
    for index in range(size):
        if index not in names:
            yield gguf.TokenType.UNUSED
        elif BYTE.fullmatch(names[index]):
            yield gguf.TokenType.BYTE
        elif index == hf.unk_token_id and index not in added:
            yield gguf.TokenType.UNKNOWN
        elif index in added:
            yield gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED
        else:
            yield gguf.TokenType.NORMAL


def _scores(names: dict[int, str], merges: list[Any], size: int) -> list[float]:
    """Return scores by which SentencePiece merges in the order of `merges`: the earlier, the higher."""
    made = dict.fromkeys(_joined(merge, "") for merge in merges)
    order = {token: -float(rank) for rank, token in enumerate(made)}
    return [order.get(names.get(index, ""), -float(len(made) + index)) for index in range(size)]


def _joined(merge: Any, between: str = " ") -> str:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    return between.join(parts)


def _write_special(writer: gguf.GGUFWriter, tokenizer: ChatTokenizer) -> None:
    hf = tokenizer.hf
    writer.add_eos_token_id(tokenizer.eos_ids[0])
    writer.add_eot_token_id(tokenizer.eos_ids[0])
    writer.add_pad_token_id(tokenizer.pad_id)
    if hf.bos_token_id is not None:
        writer.add_bos_token_id(hf.bos_token_id)
    if hf.unk_token_id is not None:
        writer.add_unk_token_id(hf.unk_token_id)
    writer.add_add_bos_token(adds_bos(hf))
    ids = hf("a")["input_ids"]
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == hf.eos_token_id)


def adds_bos(hf: PreTrainedTokenizerBase) -> bool:
    """Return whether the tokenizer puts its beginning-of-sequence token before a text."""
    return hf.bos_token_id is not None and hf("a")["input_ids"][:1] == [hf.bos_token_id]


def _adds_space(hf: PreTrainedTokenizerBase) -> bool:
    first = hf.convert_ids_to_tokens(hf("a", add_special_tokens=False)["input_ids"])[0]
    return first.startswith("\u2581")
