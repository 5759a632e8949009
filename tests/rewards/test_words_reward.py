"""The known truth of known_truth.yaml: hand-worked words, and data that is what it says."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


def loaded(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (RECIPES / "data" / name).read_text().splitlines()]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("bade", 1.0),  # all four letters from a to m
        ("botu", 0.25),  # b alone
        ("baba", 0.5),  # all liked; the second b and the second a come two letters after the first: 2 of 4
        ("aaaa", 1 - 3 / 4 - 2 / 4),  # three repeat the one before, two the one before that
        ("bcdefghijklmbc", 1.0 - 0.2),  # two letters over 12
        ("", -1.0),
    ],
)
def test_gold(word, value):
    assert loaded(RECIPES / "rewards" / "words.py").gold("Name a cup", word, {}) == pytest.approx(value)


def test_the_script_recreates_the_files_byte_for_byte(tmp_path, monkeypatch):
    module = loaded(RECIPES / "data" / "make_words.py")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "make_words.py"))
    module.main()
    for name in ("words_sft.jsonl", "words_prompts.jsonl", "words_heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (RECIPES / "data" / name).read_bytes()


def test_no_prompt_is_in_two_files_and_no_answer_repeats_a_letter():
    sft = {row["messages"][0]["content"] for row in read("words_sft.jsonl")}
    prompts, heldout = ({row["prompt"] for row in read(f"words_{name}.jsonl")} for name in ("prompts", "heldout"))
    assert not sft & prompts
    assert not (sft | prompts) & heldout
    answers = [row["messages"][1]["content"] for row in read("words_sft.jsonl")]
    assert not any(a == b for answer in answers for a, b in pairwise(answer))
