"""Models that ask for more than they hold: absurd sizes, files too large or too deep, headers that promise gigabytes."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from rlhf.models.loading import resolve_model
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.schema import ModelSource
from tests.chaos._hostile_models import Attempt, Place, use

GROWTH = 512 * 2**20
"""Bytes that the process may grow by at most when it refuses a model."""

SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    20_000, 10**9, 10**18, 10**300, -1, -(10**9), 0, "2", "20000", "", True, 2.5, 1e308, float("nan"), float("inf"),
    [], [10**9], {}, [[[]]],
)  # fmt: skip
OTHERS: tuple[tuple[str, Any], ...] = (
    ("num_labels", 10**9), ("n_layers", 10**8), ("num_nextn_predict_layers", 10**7), ("num_experts", 10**9),
    ("text_config", {"num_hidden_layers": 10**8}), ("vision_config", {"depth": 10**8}), ("layer_types", ["x"] * 20_000),
    ("rope_scaling", {"factor": "x"}), ("rope_parameters", {"rope_type": "yarn", "factor": -1}), ("model_type", "gpt2"),
    ("architectures", ["MixtralForCausalLM"]), ("dtype", "float1"), ("tie_word_embeddings", "maybe"), ("hidden_act", 3),
    ("quantization_config", {"quant_method": "gptq", "bits": 10**9}), ("eos_token_id", 10**12), ("pad_token_id", -5),
)  # fmt: skip


def peak() -> int:
    """Return the most bytes of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def within(attempt: Callable[[Place], list[str]]) -> Attempt:
    """Return an attempt that also counts how far the process grew: this much, though little is in the files."""

    def measured(place: Place) -> list[str]:
        before = peak()
        try:
            return attempt(place)
        finally:
            grown = peak() - before
            if grown > GROWTH:
                raise MemoryError(f"{attempt.__name__} took {grown // 2**20} MiB")

    measured.__name__ = attempt.__name__
    return measured


def _change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def odd_sizes(place: Place) -> list[str]:
    """A size in the config is absurd, or no number."""
    folder = place.model()
    key, value = place.rng.choice(SIZES), place.rng.choice(ODD)
    _change(folder / "config.json", **{key: value})
    use(folder)
    original = json.loads((place.tiny / "config.json").read_text())[key]
    return [] if value in ([], original) else [f"{key}: {value!r} was taken"]


def odd_entries(place: Place) -> list[str]:
    """Some other entry of the config is absurd; libraries may ignore it."""
    folder = place.model()
    _change(folder / "config.json", **dict([place.rng.choice(OTHERS)]))
    use(folder)
    return []


def large_files(place: Place) -> list[str]:
    """A file of settings or words is huge, or nested deeply."""
    folder = place.model()
    name = place.rng.choice(
        ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja",
         "model.safetensors.index.json", "special_tokens_map.json", "vocab.json", "adapter.json", "spiece.model")
    )  # fmt: skip
    file = folder / name
    if place.rng.random() < 0.5 or not name.endswith("config.json"):
        file.touch()
        os.truncate(file, 129 * 2**20)  # a hole: it takes no space
    else:
        deep = place.rng.choice((40, 900, 10**5))
        file.write_text('{"x": ' + "[" * deep + "]" * deep + "}")
    use(folder)
    return [f"{name} was taken"]


def lying_weights(place: Place) -> list[str]:
    """The header of the weights promises more than there is, or the config describes a model a thousand times larger."""
    folder = place.model()
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    kind = place.rng.choice(("length", "cut", "offsets", "shape", "config", "missing", "text"))
    if kind == "length":
        file.write_bytes(struct.pack("<Q", 2 ** place.rng.choice((20, 40, 63))) + content[8:])
    elif kind == "cut":
        file.write_bytes(content[: place.rng.randrange(len(content))])
    elif kind in ("offsets", "shape"):
        tensor = header[place.rng.choice([name for name in header if name != "__metadata__"])]
        if kind == "offsets":
            tensor["data_offsets"][1] += 2**40
        else:
            tensor["shape"][0] *= 2**40
        new = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + length :])
    elif kind == "config":
        _change(folder / "config.json", hidden_size=2**15, intermediate_size=2**17, num_hidden_layers=100)
    elif kind == "missing":
        weights = load_file(file)
        save_file({name: weights[name] for name in list(weights)[:3]}, file, {"format": "pt"})
        _change(folder / "config.json", num_hidden_layers=1000, intermediate_size=2**15)
    else:
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    use(folder)
    return [f"weights with a wrong {kind} were taken"]


def odd_words(place: Place) -> list[str]:
    """The tokenizer pads to gigabytes, has ids out of range, or is none."""
    folder = place.model()
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    change = place.rng.choice(
        (
            {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": "x"}},
            {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}},
            {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}},
            {"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}},
            {"model": {"type": "Unigram", "vocab": [["a", float("inf")]], "unk_id": 10**9}},
            {"model": {"type": "Nothing"}},
            {"added_tokens": [{"id": 2**40, "content": "x", "special": True}]},
            {"added_tokens": [{**words["added_tokens"][0], "content": ""}]},
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
            {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False}},
            {"post_processor": {"type": "TemplateProcessing", "single": "x"}},
        )
    )  # fmt: skip
    file.write_text(json.dumps(words | change))
    tokenizer = load_tokenizer(resolve_model(ModelSource(path=str(folder)), cache=place.folder / "cache"))
    ids = tokenizer.prompt_ids([{"role": "user", "content": "Hi <|im_end|>"}])
    return ["a tokenizer made gigabytes"] if len(ids) > 1000 else []


def _text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _gguf(entries: list[bytes], tensors: list[bytes], data: bytes = b"") -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def _tensor(name: bytes, shape: tuple[int, ...], offset: int = 0, kind: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def hostile_gguf(place: Place) -> list[str]:
    """A GGUF file of some bytes announces strings, lists, tensors or layers beyond counting."""
    arch = _text(b"general.architecture") + struct.pack("<I", 8) + _text(b"llama")
    large = {b"llama.block_count": 1000, b"llama.embedding_length": 2**15, b"llama.feed_forward_length": 2**17,
             b"llama.attention.head_count": 8, b"llama.context_length": 2048, b"llama.vocab_size": 2**20}  # fmt: skip
    sizes = [_text(key) + struct.pack("<II", 4, value) for key, value in large.items()]
    huge = 2 ** place.rng.choice((31, 40, 62))
    start = b"GGUF" + struct.pack("<I", 3)
    content = place.rng.choice(
        (
            b"", b"GGUF", b"GGUX" + bytes(60), start + bytes(4), b"GGUF" + struct.pack("<I", 99) + bytes(60),
            start + struct.pack("<QQ", huge, 0) + bytes(44),
            start + struct.pack("<QQ", 0, huge) + bytes(44),
            start + struct.pack("<QQQ", 0, 1, huge) + bytes(36),
            _gguf([_text(b"x") + struct.pack("<IIQ", 9, place.rng.choice((0, 8, 12)), huge)], []),
            _gguf([_text(b"x") + struct.pack("<IIQ", 9, 9, 1) * 30], []),
            _gguf([_text(b"x") + struct.pack("<IQ", 8, huge)], []),
            _gguf([_text(b"x") + struct.pack("<I", 77)], []),
            _gguf([_text(b"general.alignment") + struct.pack("<II", 4, 0)], [_tensor(b"t", (1,))], bytes(4)),
            _gguf([arch, _text(b"llama.block_count") + struct.pack("<II", 4, 20_000)], [_tensor(b"t", (1,))], bytes(4)),
            _gguf([arch, *sizes], [_tensor(b"token_embd.weight", (8, 8))], bytes(256)),
            _gguf([arch], [_tensor(b"t", (huge, huge))], bytes(64)),
            _gguf([arch], [_tensor(b"t", (16,), huge)], bytes(64)),
            _gguf([arch], [_tensor(b"a", (16,)), _tensor(b"b", (16,))], bytes(64)),
            _gguf([arch], [_tensor(b"t", (16,), kind=999)], bytes(64)),
            _gguf([arch], [_tensor(b"t", ())], bytes(64)),
            _gguf([arch, arch], [_tensor(b"t", (16,))], bytes(64)),
            _gguf([arch], [_tensor(b"t", (16,))], bytes(64)),
        )
    )  # fmt: skip
    file = place.folder / "model.gguf"
    file.write_bytes(content)
    resolve_model(ModelSource(path=f"gguf://{file}"), cache=place.folder / "cache")
    return ["a hostile GGUF file was taken"]


ATTEMPTS: tuple[Attempt, ...] = tuple(
    map(within, (odd_sizes, odd_entries, large_files, lying_weights, odd_words, hostile_gguf))
)
