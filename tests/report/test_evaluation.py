"""Finished runs compared with each other: what is put together, under which names, and what is refused."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, fields, replace

import pytest
from made import samples

from rlhf.errors import DataError
from rlhf.recipe.base import Budget
from rlhf.report.evaluation import Evaluation, merge, read_evaluation, sample_file, write_evaluation
from rlhf.report.frontier import frontier_point
from rlhf.report.sample_file import read_samples, write_samples
from rlhf.report.samples import ChatScores, Sample, Samples

CONDITIONS = {"the set of prompts": "abc", "temperature": "1.0"}


def evaluation(ppo_gold: float = 0.5, baseline_key: str = "one", reward_key: str = "rm") -> Evaluation:
    sft, ppo = samples("sft"), samples("ppo", gold=ppo_gold, kl=2.0)
    return Evaluation(
        baseline="sft",
        baseline_key=baseline_key,
        reward_key=reward_key,
        conditions=CONDITIONS,
        candidates=(sft, ppo),
        frontier=(frontier_point("ppo", ppo.samples, 4),),
        budget=Budget(gradient_tokens=100),
        reward_accuracy=0.8,
        facts={"KL": "to the reference", "Model": "tiny"},
        seed=3,
        bootstrap_samples=300,
    )


def keep(run, item):
    folder = run / "stages" / "duel"
    for candidate in item.candidates:
        write_samples(sample_file(folder, candidate.name), candidate.samples)
    write_evaluation(folder, item)
    return folder


def test_an_evaluation_comes_back_as_it_was_written(tmp_path):
    kept = evaluation()
    chats = ChatScores.of([1.5, math.inf], [2, 3])
    kept = replace(kept, candidates=(replace(kept.candidates[0], retention=chats), kept.candidates[1]))
    folder = keep(tmp_path, kept)
    assert read_evaluation(tmp_path) == kept
    assert len((folder / "evaluation.json").read_bytes()) < 3000
    rows = [json.loads(line) for line in (folder / "samples" / "ppo" / "step-00000.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [f"answer {place} of ppo" for place in range(24)]
    assert [row["score"] for row in rows] == kept.candidates[1].samples.gold.tolist()


def test_texts_of_any_kind_and_numbers_that_are_none_come_back(tmp_path):
    row = Sample("p\n0", "\ud800 \u2028 {", 'é "\\ud800"', math.nan, math.inf, -math.inf, 3, "length", 0.1)
    other = replace(row, response="x", reward=0.25, finish_reason="stop")
    written = write_samples(tmp_path / "a.jsonl", [row, other])
    assert written == read_samples(tmp_path / "a.jsonl") == Samples.of([row, other])
    assert (written.distinct, written.cut.tolist()) == (2, [True, False])


def test_an_evaluation_of_an_earlier_version_is_read(tmp_path):
    kept = evaluation()
    candidates = [
        {"name": item.name, "kind": item.kind, "samples": [asdict(sample) for sample in item.samples], "cost": None,
         "preference_accuracy": None, "retention": [{"nats": 2.0, "tokens": 3}]}
        for item in kept.candidates
    ]  # fmt: skip
    known = {field.name: getattr(kept, field.name) for field in fields(kept) if field.name != "candidates"}
    content = known | {"candidates": candidates, "budget": kept.budget.model_dump(), "frontier": []}
    (tmp_path / "stages" / "duel").mkdir(parents=True)
    (tmp_path / "stages" / "duel" / "evaluation.json").write_text(json.dumps(content))
    found = read_evaluation(tmp_path)
    assert [item.samples for item in found.candidates] == [item.samples for item in kept.candidates]
    assert found.candidates[0].retention == ChatScores.of([2.0], [3])


def test_the_evaluation_of_a_classifier_is_another_thing(tmp_path):
    folder = keep(tmp_path, evaluation())
    (tmp_path / "stages" / "topics").mkdir()
    (tmp_path / "stages" / "topics" / "evaluation.json").write_text('{"labels": []}')
    os.utime(folder / "evaluation.json", (1, 1))
    assert read_evaluation(tmp_path) == evaluation()


@pytest.mark.parametrize("damage", [b"", b'{"prompt_id": "p0"', b"[1]", b'{"prompt_id": 7}'])
def test_a_damaged_row_is_named(tmp_path, damage):
    file = sample_file(keep(tmp_path, evaluation()), "ppo")
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    with pytest.raises(DataError, match=r"step-00000\.jsonl:2: "):
        read_evaluation(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"step-00000\.jsonl: No such file"):
        read_evaluation(tmp_path)


def test_a_candidate_cannot_name_a_file_elsewhere(tmp_path):
    folder = keep(tmp_path, evaluation())
    content = (folder / "evaluation.json").read_text().replace('"name":"ppo"', '"name":"../../x"')
    (folder / "evaluation.json").write_text(content)
    with pytest.raises(DataError, match="no name of a candidate"):
        read_evaluation(tmp_path)


def test_a_shared_baseline_stands_once():
    merged = merge({"a": evaluation(0.5), "b": evaluation(0.9)})
    assert [item.name for item in merged.candidates] == ["sft", "a/ppo", "b/ppo"]
    assert [(point.method, point.run) for point in merged.frontier] == [("a/ppo", "a/ppo"), ("b/ppo", "b/ppo")]
    comparison = merged.compare()
    assert comparison.baseline == "sft"
    assert comparison.difference("b/ppo", "a/ppo", "gold").difference == pytest.approx(0.4, abs=1e-9)
    assert merged.budget == Budget(gradient_tokens=100)


def test_different_baselines_all_stand_and_the_report_says_what_the_kl_is_to():
    merged = merge({"a": evaluation(), "b": evaluation(baseline_key="other")})
    assert [item.name for item in merged.candidates] == ["a/sft", "a/ppo", "b/sft", "b/ppo"]
    assert merged.baseline == "a/sft"
    assert "KL (to each run's own baseline, 2 different ones)" in merged.facts


def test_scores_of_different_reward_models_are_not_set_side_by_side():
    merged = merge({"a": evaluation(), "b": evaluation(reward_key="another")})
    assert {item.samples.reward for item in merged.candidates} == {None}
    assert {point.reward for point in merged.frontier} == {None}
    kept = merge({"a": evaluation(), "b": evaluation()})
    assert all(item.samples.reward is not None for item in kept.candidates)


def test_runs_under_seeds_stay_runs_of_one_method():
    one = evaluation()
    seeded = replace(one, candidates=(one.candidates[0], samples("ppo@1"), samples("ppo@2")), frontier=())
    comparison = merge({"a": seeded, "b": one}).compare()
    assert [len(item.runs) for item in comparison.candidates] == [1, 2, 1]


@pytest.mark.parametrize("condition", list(CONDITIONS))
def test_an_unequal_footing_is_refused_and_named(condition):
    other = replace(evaluation(), conditions=CONDITIONS | {condition: "something else"})
    with pytest.raises(DataError, match=rf"not compared on an equal footing: {condition} is .* something else"):
        merge({"a": evaluation(), "b": other})


def test_a_folder_without_a_comparison(tmp_path):
    with pytest.raises(DataError, match="no finished comparison"):
        read_evaluation(tmp_path)


def test_a_damaged_file(tmp_path):
    folder = tmp_path / "stages" / "duel"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text('{"baseline": 3}')
    with pytest.raises(DataError, match=r"evaluation\.json:1: not an evaluation"):
        read_evaluation(tmp_path)
