"""The retention chats as a model scores them: against plain transformers, and texts that another tokenizer cuts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.data.reading import read_conversations
from rlhf.engines.base import LearnerSpec
from rlhf.errors import DataError
from rlhf.local import LocalModel
from rlhf.recipe.base import PathData
from rlhf.recipe.stage_schema import CompareStage
from rlhf.stages.drawn import Drawn
from rlhf.stages.evaluate import add_chats, chat_scores
from rlhf.stages.parts import Parts
from rlhf.stages.retention import Retained, read_retention

CHATS = [
    [("user", "Hi."), ("assistant", "Hello!")],
    [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6.")],
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(file: Path, model: Path, tokenizer) -> Retained:
    judge = {"kind": "function", "path": "judge.py:score"}
    stage = CompareStage(
        kind="compare", name="duel", candidates=["base", "sft"], baseline="base", prompts={"path": "p"}, gold=judge,
        retention=PathData(path=file),
    )  # fmt: skip
    return read_retention(stage, SimpleNamespace(tokenizer=lambda name: tokenizer, checkpoint=lambda name: model))


@pytest.fixture
def policy(tiny_folder):
    spec = LearnerSpec(
        role="policy", kind="causal", checkpoint=tiny_folder, dtype="float32", tuning=None, optimizer=None,
        head_learning_rate=None, max_tokens_per_microbatch=64, temperature=1.0, threads=1, seed=0,
    )  # fmt: skip
    return LocalModel(spec)


@pytest.mark.parametrize("tokens_in_a_part", [1, 1000])
def test_scores_are_those_of_plain_transformers_on_what_the_assistant_says(
    tokens_in_a_part, file, policy, tiny_folder, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("rlhf.stages.evaluate.PART_TOKENS", tokens_in_a_part)
    retained = read(file, tiny_folder, tiny_tokenizer)
    # The bytes of the answers, and an end for each of them.
    assert retained.tokens == [len("Hello!") + 1, len("4") + 1 + len("6.") + 1]
    item, made = Drawn("sft", [], False, 1, Parts(tmp_path / "parts", print)), []
    context = SimpleNamespace(checkpoint=lambda name: tiny_folder)
    add_chats(item, retained, tiny_tokenizer, lambda: policy, context, made.append)
    assert len(made) == (2 if tokens_in_a_part == 1 else 1)
    scores = chat_scores(item, retained)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert scores.tokens.tolist() == retained.tokens
    for row, nats, _ in zip(read_conversations(PathData(path=file)), scores.nats, retained.tokens, strict=True):
        tokens, mask = tiny_tokenizer.conversation_ids(row.messages)
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert nats == pytest.approx(-float(picked[torch.tensor(mask[1:])].sum()), rel=1e-5)


def test_a_chat_longer_than_the_model_is_named(file, tiny_folder, tiny_tokenizer):
    with file.open("a") as more:
        more.write(json.dumps({"prompt": "Go on.", "completion": "on " * 200}) + "\n")
    file.write_text(file.read_text().splitlines()[2] + "\n")
    with pytest.raises(DataError, match=r"chats\.jsonl:1: the chat has \d+ tokens, the model 512 positions"):
        read(file, tiny_folder, tiny_tokenizer)


def test_the_key_tells_other_chats_and_other_counts(file, tiny_folder, tiny_tokenizer):
    retained = read(file, tiny_folder, tiny_tokenizer)
    assert retained.key == read(file, tiny_folder, tiny_tokenizer).key
    assert retained.key != Retained(retained.rows, [1, 1]).key
    assert retained.key != Retained(retained.rows[::-1], retained.tokens).key
