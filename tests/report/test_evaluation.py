"""Finished runs compared with each other: what is put together, under which names, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made import samples

from rlhf.errors import DataError
from rlhf.recipe.base import Budget
from rlhf.report.evaluation import Evaluation, merge, read_evaluation, write_evaluation
from rlhf.report.frontier import frontier_point

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


def test_an_evaluation_comes_back_as_it_was_written(tmp_path):
    (tmp_path / "stages" / "duel").mkdir(parents=True)
    write_evaluation(tmp_path / "stages" / "duel", evaluation())
    assert read_evaluation(tmp_path) == evaluation()


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
    assert {sample.reward for item in merged.candidates for sample in item.samples} == {None}
    assert {point.reward for point in merged.frontier} == {None}
    kept = merge({"a": evaluation(), "b": evaluation()})
    assert all(sample.reward is not None for item in kept.candidates for sample in item.samples)


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
