"""`rlhf eval`: the shipped task without a network, several models in one table, mistakes in one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from rlhf.cli import main
from rlhf.export.source import find_models
from rlhf.installing import extra_command
from rlhf.serving import harness

TASKS = Path(__file__).parents[2] / "recipes" / "eval"


def invoke(*arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def test_two_stages_stand_in_one_table(run, tmp_path):
    output = tmp_path / "scores.json"
    done = invoke(
        run / "sft", run / "dpo", "--task-folder", TASKS, "--tasks", "everyday", "--limit", 20, "--json", output
    )
    assert done.exit_code == 0, done.output
    assert "everyday" in done.output
    assert "±" in done.output
    scores = json.loads(output.read_text())["scores"]
    assert {(one["model"], one["metric"]) for one in scores} == {
        (model, metric) for model in ("sft", "dpo") for metric in ("acc", "acc_norm")
    }
    for one in scores:
        assert one["n"] == 20
        assert 0 <= one["value"] <= 1
        assert one["error"] == pytest.approx((one["value"] * (1 - one["value"]) / 19) ** 0.5)


def test_accuracy_is_that_of_the_most_likely_answer(run, tmp_path):
    """One question of two answers, and its likelihoods by hand."""
    import torch

    from rlhf.serving.talk import LocalTalker

    model = find_models([str(run / "sft")])[0]
    talker = LocalTalker(model.name, model.folder)

    def likelihood(answer):
        prompt = talker.tokenizer.hf("Q: x\nA:", add_special_tokens=False)["input_ids"]
        whole = talker.tokenizer.hf(f"Q: x\nA: {answer}", add_special_tokens=False)["input_ids"]
        logprobs = talker.model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(logprobs[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))

    best = max(range(2), key=lambda i: likelihood(("cab", "zest")[i]))
    rows = [
        {"q": "x", "choices": ["cab", "zest"], "answer": best},
        {"q": "x", "choices": ["cab", "zest"], "answer": 1 - best},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pick.yaml").write_text(
        "task: pick\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "Q: {{q}}\\nA:"\ndoc_to_choice: "{{choices}}"\n'
        "doc_to_target: answer\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    wanted = harness.Wanted(("pick",), tmp_path, limit=1)
    assert [score.value for score in harness.evaluate([model], wanted)] == [1.0]
    assert [score.value for score in harness.evaluate([model], harness.Wanted(("pick",), tmp_path))] == [0.5]


def test_the_shipped_questions_are_fair():
    rows = [json.loads(line) for line in (TASKS / "everyday.jsonl").read_text().splitlines()]
    assert len(rows) == 40
    assert [sum(row["answer"] == place for row in rows) for place in range(4)] == [10] * 4
    assert all(len(set(row["choices"])) == 4 for row in rows)
    assert len({row["question"] for row in rows}) == 40


def test_mistakes_are_said_in_a_line(run, tmp_path, monkeypatch):
    unknown = invoke(run / "sft", "--tasks", "everydy", "--task-folder", TASKS)
    assert unknown.exit_code == 2
    assert "the harness has no such task (did you mean everyday?)" in unknown.output
    empty = invoke(run / "sft", "--tasks", "x", "--task-folder", tmp_path)
    assert "no task (*.yaml) in it" in empty.output
    task = (TASKS / "everyday.yaml").read_text().replace("dataset_path: json", "dataset_path: allenai/ai2_arc")
    (tmp_path / "away.yaml").write_text(re.sub("dataset_kwargs:\n.*\n", "", task).replace("everyday", "away"))
    away = invoke(run / "sft", "--tasks", "away", "--task-folder", tmp_path)
    assert away.exit_code == 4
    assert "its data is on the Hugging Face hub, which cannot be reached" in away.output
    assert len(away.output.strip().splitlines()) == 1
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    missing = invoke(run / "sft", "--tasks", "x")
    assert missing.exit_code == 2
    assert extra_command("eval") in missing.output
