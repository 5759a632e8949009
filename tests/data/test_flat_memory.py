"""What reading costs in memory for each further row: some bytes, not the row."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from byte_tokenizer import ByteTokenizer

from rlhf.data import workers
from rlhf.data.disjoint import check_disjoint
from rlhf.data.inspection import Use, inspect_source
from rlhf.data.reading import read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.recipe.base import PathData
from rlhf.recipe.preference_schema import DpoStage, KtoStage
from rlhf.recipe.stage_schema import ClassifyStage, CompareStage, SftStage
from rlhf.stages import classify, pairs
from rlhf.stages.heldout import split_sequences
from rlhf.stages.kto import _split, mismatches
from rlhf.stages.sft import _sequences

FEW, MANY = 150, 600
A_ROW = 300
"""Bytes. The texts of a row below take 1,000 bytes and their tokens 16,000 as Python's integers."""

CONTEXT = SimpleNamespace(
    seed=lambda *_: 5, outputs={}, tracker=SimpleNamespace(say=lambda _: None), checkpoint=lambda _: None
)


class Tokenizer(ByteTokenizer):
    hf = SimpleNamespace(decode=lambda ids, **_: ByteTokenizer().decode(ids))


TOKENIZER = Tokenizer()
SAID = "lorem ipsum dolor " * 28


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Small parts, so that what does not grow is little, and no other processes, whose memory would not be seen."""
    monkeypatch.setattr(workers, "CHARACTERS", 1 << 15)
    monkeypatch.setattr(workers, "HERE", 10**9)


def written(path: Path, rows: int, row: Callable[[int], dict]) -> PathData:
    with path.open("w") as file:
        for number in range(rows):
            file.write(json.dumps(row(number)) + "\n")
    return PathData(path=path)


def pair(number: int) -> dict:
    return {"prompt": f"{number} {SAID}", "chosen": f"a {SAID}", "rejected": f"b {SAID}"}


def labelled(number: int) -> dict:
    return {"prompt": f"{number} {SAID}", "completion": SAID, "label": number % 2 == 0}


def text(number: int) -> dict:
    return {"text": f"{number} {SAID}", "label": f"class {number % 3}"}


def prompt(number: int) -> dict:
    return {"id": f"p-{number}", "prompt": f"{number} {SAID}", "source": SAID}


def train_on_pairs(source: PathData) -> object:
    stage = DpoStage(name="dpo", kind="dpo", policy="base", data=source, max_length=4096)
    split = pairs.load_pairs(stage, CONTEXT, TOKENIZER)
    assert len(split.train[0].chosen.tokens) > 1000
    return split


def train_on_answers(source: PathData) -> object:
    stage = KtoStage(name="kto", kind="kto", policy="base", data=source, max_length=4096)
    split = pairs.load_examples(stage, CONTEXT, TOKENIZER)
    others = mismatches(split.train, [_split(split.train[0].sequence)[0], (1,)], 4096)
    return split, others


def train_on_chats(source: PathData) -> object:
    stage = SftStage(name="sft", kind="sft", data=source, max_length=4096)
    return split_sequences(stage, _sequences(stage, CONTEXT, TOKENIZER), CONTEXT)


def train_on_texts(source: PathData) -> object:
    stage = ClassifyStage(name="c", kind="classify", data=source, max_length=4096)
    return classify.load_texts(stage, CONTEXT, TOKENIZER)


def sample_prompts(source: PathData) -> object:
    prompts = tokenize_prompts(read_prompts(source), TOKENIZER, 4096)
    assert prompts[-1].metadata == {"source": SAID}
    return prompts


def inspect(source: PathData) -> object:
    return inspect_source(Use(source, "preferences", (), "max_length", 4096), TOKENIZER)


def inspect_prompts(source: PathData) -> object:
    return inspect_source(Use(source, "prompts"), TOKENIZER)


def keep_apart(source: PathData) -> object:
    judged = written(source.path.with_name("held.jsonl"), 1, prompt)
    judged.path.write_text('{"prompt": "another"}\n')
    compare = CompareStage.model_construct(name="duel", kind="compare", prompts=judged)
    sft = DpoStage(name="dpo", kind="dpo", policy="base", data=source)
    return check_disjoint(SimpleNamespace(stages=(sft, compare)))


KINDS = {
    "pairs": (pair, train_on_pairs),
    "labelled answers": (labelled, train_on_answers),
    "chats": (lambda n: {"prompt": f"{n} {SAID}", "completion": SAID}, train_on_chats),
    "texts": (text, train_on_texts),
    "prompts": (prompt, sample_prompts),
    "inspection": (pair, inspect),
    "inspection of prompts": (prompt, inspect_prompts),
    "comparison prompts": (pair, keep_apart),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_further_row_costs_some_bytes(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    row, read = KINDS[kind]
    read(written(tmp_path / "first.jsonl", 40, row))  # what is imported on the way does not count
    peaks = []
    for rows in (FEW, MANY):
        source = written(tmp_path / f"{rows}.jsonl", rows, row)
        tracemalloc.start()
        try:
            read(source)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < A_ROW * (MANY - FEW)
