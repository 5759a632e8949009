"""The files that the quickstart and the smoke test train on."""

import json
import re
import statistics
from pathlib import Path

import pytest
from byte_tokenizer import ByteTokenizer
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf.data.reading import read_conversations, read_preferences, read_prompts
from rlhf.data.tokenize import tokenize_prompts
from rlhf.recipe.base import PathData
from rlhf.rewards.user_function import load_function

RECIPES = Path(__file__).parents[2] / "recipes"
DATA = RECIPES / "data"
PROMPT_FILES = {"annotate": 448, "ppo": 400, "heldout": 128}


def raw(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def reviews():
    return {name: raw(f"reviews_{name}.jsonl") for name in ("sft", *PROMPT_FILES)}


def test_the_script_recreates_the_files_byte_for_byte():
    files = load_function(f"{DATA}/make_reviews.py:files")()
    assert sorted(files) == [f"reviews_{name}.jsonl" for name in ("annotate", "heldout", "ppo", "sft")]
    for name, rows in files.items():
        assert "".join(json.dumps(row) + "\n" for row in rows).encode() == (DATA / name).read_bytes()


def test_the_training_rows_never_meet_the_held_out_ones(reviews):
    prompts = {name: {row["prompt"] for row in reviews[name]} for name in PROMPT_FILES}
    assert {name: len(texts) for name, texts in prompts.items()} == PROMPT_FILES
    assert len(set.union(*prompts.values())) == sum(PROMPT_FILES.values())
    pairs = {name: {(row["thing"], row["aspect"]) for row in rows} for name, rows in reviews.items()}
    assert not pairs["annotate"] & pairs["ppo"]
    assert not pairs["heldout"] & (pairs["annotate"] | pairs["ppo"] | pairs["sft"])
    assert {row["messages"][0]["content"] for row in reviews["sft"]}.isdisjoint(prompts["heldout"])


def test_prompts_name_their_thing_and_aspect(reviews):
    for name in PROMPT_FILES:
        for row in reviews[name]:
            assert re.search(rf"\b{row['thing']}\b.*\b{row['aspect']}\b", row["prompt"])


def test_sft_reviews_are_balanced_around_a_gold_of_zero(reviews):
    gold = load_function(f"{RECIPES}/rewards/reviews.py:gold")
    answers = [(row["messages"][1]["content"], row) for row in reviews["sft"]]
    scores = [gold("", text, row) for text, row in answers]
    assert len(scores) == 640
    assert abs(statistics.mean(scores)) < 0.05
    assert 0.60 < statistics.pstdev(scores) < 0.70
    mentioned = [row["aspect"] in text for text, row in answers]
    assert 0.94 < statistics.mean(mentioned) < 0.99
    lengths = [len(text.split()) for text, _ in answers]
    assert (min(lengths), max(lengths)) >= (8, 12)
    assert max(lengths) <= 16
    assert len({text for text, _ in answers}) > 600


def test_the_library_reads_the_shipped_reviews():
    assert len(read_conversations(PathData(path=DATA / "reviews_sft.jsonl"))) == 640
    for name, rows in PROMPT_FILES.items():
        prompts = tokenize_prompts(read_prompts(PathData(path=DATA / f"reviews_{name}.jsonl")), ByteTokenizer(), 128)
        assert len(prompts) == rows
        assert set(prompts[0].metadata) == {"thing", "aspect"}


def test_the_smoke_files_are_small_and_disjoint():
    assert len(read_conversations(PathData(path=DATA / "smoke_sft.jsonl"))) == 24
    assert len(read_preferences(PathData(path=DATA / "smoke_pairs.jsonl"))) == 16
    training, heldout = (
        tokenize_prompts(read_prompts(PathData(path=DATA / f"smoke_{name}.jsonl")), ByteTokenizer(), 16)
        for name in ("prompts", "heldout")
    )
    assert (len(training), len(heldout)) == (32, 16)
    assert {row.text for row in training}.isdisjoint(row.text for row in heldout)


def test_smoke_answers_are_what_the_smoke_reward_likes():
    gold = load_function(f"{RECIPES}/rewards/smoke.py:gold")
    for pair in read_preferences(PathData(path=DATA / "smoke_pairs.jsonl")):
        assert gold("", pair.chosen, {}) == 1.0 > gold("", pair.rejected, {})
    for chat in read_conversations(PathData(path=DATA / "smoke_sft.jsonl")):
        assert gold("", chat.messages[-1]["content"], {}) == 1.0


def test_the_chat_template_is_chatml_without_a_default_system_message():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((DATA / "chatml.jinja").read_text())
    messages = [{"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "yo"}]
    whole = "<|im_start|>user\n hi\n<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"
    assert template.render(messages=messages) == whole
    question = "<|im_start|>user\n hi\n<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(messages=messages[:1], add_generation_prompt=True) == question
    assert whole.startswith(question)
