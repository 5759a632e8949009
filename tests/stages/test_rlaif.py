"""Preferences by a language model that runs here: the smoke recipe in this process, and again from the cache."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.data.pairs import read_pairs
from rlhf.local import LocalLauncher
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import local_resources
from rlhf.recipe_run import run_recipe

RECIPE = Path(__file__).parents[2] / "recipes" / "smoke" / "rlaif.yaml"


def run(folder: Path, *overrides: str) -> dict:
    """Run the recipe locally; return what the annotate stage summed up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf.recipe_run.local_resources", lambda: replace(local_resources(), cpus=1))
        run_recipe(load_recipe(RECIPE, overrides), LocalLauncher, folder, Console(record=True, width=200))
    return json.loads((folder / "stages" / "pairs" / "done.json").read_text())["summary"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Iterator[tuple[Path, dict]]:
    """Verdicts of other tests must not answer for the judge, nor these for theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("run")
        yield folder, run(folder)


def test_every_pair_of_samples_is_judged_in_both_orders(finished):
    folder, summary = finished
    assert summary["questions_asked"] == 8 * 3 * 2
    assert summary["unreadable_answers"] == 0
    pairs = read_pairs(folder / "stages" / "pairs" / "pairs.jsonl")
    assert [key for key, _ in groupby(pairs, key=lambda pair: pair.prompt_id)] == [pair.prompt_id for pair in pairs]
    for pair in pairs:
        assert 0 <= pair.rejected_score < pair.chosen_score <= 1


def test_the_policy_is_trained_on_them(finished):
    folder, _ = finished
    assert json.loads((folder / "stages" / "dpo" / "done.json").read_text())["summary"]["pairs"] > 0
    assert (folder / "stages" / "dpo" / "model" / "model.safetensors").exists()


def test_a_second_run_asks_nothing_and_says_the_same(finished, tmp_path):
    folder, _ = finished
    assert run(tmp_path)["questions_asked"] == 0
    for name in ("pairs.jsonl", "best.jsonl"):
        first, second = (place / "stages" / "pairs" / name for place in (folder, tmp_path))
        assert first.read_bytes() == second.read_bytes()


def test_the_judge_can_be_the_reward_of_online_training(finished, tmp_path):
    """PPO in the place of the recipe's DPO. A score is the share of the others that a sample beats: 0.5 in the mean."""
    text = RECIPE.read_text().partition("  - name: dpo")[0].replace("../data", str(RECIPE.parents[1] / "data"))
    judge = '{kind: llm, model: "tiny://llama", criteria: "Which is shorter?", max_prompt_tokens: 511}'
    text += f"""\
  - name: rl
    kind: ppo
    policy: base
    reward: {judge}
    prompts: {{path: {RECIPE.parents[1] / "data" / "smoke_prompts.jsonl"}}}
    steps: 1
    prompts_per_step: 2
    samples_per_prompt: 3
    minibatch_size: 6
    max_prompt_tokens: 64
    max_response_tokens: 8
"""
    (tmp_path / "recipe.yaml").write_text(text)
    console = Console(record=True, width=200)
    run_recipe(load_recipe(tmp_path / "recipe.yaml", ()), LocalLauncher, tmp_path / "run", console)
    row = json.loads((tmp_path / "run" / "stages" / "rl" / "metrics.jsonl").read_text())
    assert row["reward"] == pytest.approx(0.5, abs=1e-6)
    assert row["reward_std"] > 0
