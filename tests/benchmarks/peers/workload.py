"""The models and the data that both sides get: deterministic, from seeds, saved where both can read them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from tests.benchmarks.peers.rows import Row
from tests.benchmarks.peers.task import EOS, PAD, UNKNOWN, Example

SPECIAL = {"<pad>": PAD, "<eos>": EOS, "<unk>": UNKNOWN}
VOCABULARY = 32_000
LONGEST = 640
TEMPLATE = "{% for m in messages %}{{ m['content'] + (' <eos>' if m['role'] == 'assistant' else ' ') }}{% endfor %}"
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
"""A Llama of 45 M weights, 12.6 M of them in its layers and 16.4 M in its head."""


def build_models(folder: Path) -> tuple[Path, Path]:
    """Return the folders of the language model and of the scalar one, both bfloat16, written if they are not there."""
    causal, scalar = folder / "causal", folder / "scalar"
    for target, kind, extra in (
        (causal, LlamaForCausalLM, {}),
        (scalar, LlamaForSequenceClassification, {"num_labels": 1}),
    ):
        if (target / "model.safetensors").exists():
            continue
        torch.manual_seed(17)
        special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
        kind(LlamaConfig(**SHAPE, **special, **extra)).to(torch.bfloat16).save_pretrained(target)
        _tokenizer().save_pretrained(target)
    return causal, scalar


def step_examples(row: Row, steps: int, seed: int = 5) -> list[list[Example]]:
    """Return the examples of each step; every completion ends with the end-of-sequence token.

    The step with the most tokens comes first, in the warm-up, so that a process has the memory that it needs by the
    time that steps count: a page that is new to it may cost more than what is computed on it.
    """
    draw = np.random.default_rng(seed)

    def ids(mean: float) -> list[int]:
        return draw.integers(len(SPECIAL), VOCABULARY, _length(draw, mean, row.sigma)).tolist()

    def example() -> Example:
        prompt = ids(row.prompt)
        return Example(prompt, [[*ids(row.completion)[:-1], EOS] for _ in range(row.completions)])

    made = [[example() for _ in range(row.examples)] for _ in range(steps)]
    largest = max(range(steps), key=lambda step: row.tokens(made[step]))
    return [made.pop(largest), *made]


def spread_examples(sigma: float, rows: int, mean: int, steps: int) -> list[list[Example]]:
    """Return sequences of lognormal lengths, `rows * mean` tokens in every step whatever `sigma` is."""
    draw = np.random.default_rng(7)
    made = []
    for _ in range(steps):
        raw = draw.lognormal(0.0, sigma, rows)
        lengths = np.maximum(16, np.round(raw / raw.sum() * rows * mean)).astype(int)
        lengths[lengths.argmax()] += rows * mean - lengths.sum()
        rows_ids = [draw.integers(len(SPECIAL), VOCABULARY, length).tolist() for length in lengths]
        made.append([Example(ids[: len(ids) // 2], [ids[len(ids) // 2 :]]) for ids in rows_ids])
    return made


def _length(draw: np.random.Generator, mean: float, sigma: float) -> int:
    return int(np.clip(draw.lognormal(math.log(mean) - sigma**2 / 2, sigma), 8, LONGEST))


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{number}": number for number in range(len(SPECIAL), VOCABULARY)}
    backend = Tokenizer(WordLevel(vocab=SPECIAL | words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
