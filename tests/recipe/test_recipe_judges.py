"""Recipes with a language model as judge: the roles they take, the secrets they need, and what is refused."""

from __future__ import annotations

import re

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.load import load_recipe
from rlhf.recipe.resources import Wanted, processes, threads, wanted
from rlhf.recipe.schema import Recipe
from rlhf.rewards.http import check_tokens

JUDGED = {"kind": "llm", "model": "tiny://llama"}
ANNOTATE = {"name": "pairs", "kind": "annotate", "policy": "base", "prompts": {"hub": "a/b"}, "judge": JUDGED}
GRPO = {"name": "rl", "kind": "grpo", "policy": "base", "prompts": {"hub": "a/b"}, "reward": JUDGED, "steps": 1}
DUEL = {
    "name": "duel", "kind": "compare", "candidates": ["base", "rl"], "baseline": "base", "prompts": {"hub": "c/d"},
    "gold": JUDGED,
}  # fmt: skip
MINIMAL = {"name": "t", "model": {"path": "tiny://llama"}, "stages": [ANNOTATE, GRPO, DUEL]}


def test_a_judge_that_runs_here_is_a_role_of_its_stages():
    recipe = Recipe.model_validate({**MINIMAL, "roles": {"judge": {"gpus": 1, "replicas": 2}}})
    assert [tuple(wanted(recipe, stage)) for stage in recipe.stages] == [
        ("judge", "rollout"),
        ("policy", "reference", "judge", "rollout"),
        ("policy", "judge", "rollout"),
    ]
    assert processes(recipe)["judge"] == Wanted(1, 1, 2)
    assert threads(recipe, recipe.stages[0], 8)["judge"] == 4


def test_a_judge_behind_a_url_is_no_role():
    there = {**ANNOTATE, "judge": {**JUDGED, "url": "http://host/v1"}}
    recipe = Recipe.model_validate({**MINIMAL, "stages": [there]})
    assert tuple(processes(recipe)) == ("rollout",)


def test_missing_secrets_are_found_before_anything_is_computed(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    there = {**ANNOTATE, "judge": {**JUDGED, "url": "http://host/v1", "api_key_env": "NO_KEY"}}
    with pytest.raises(RecipeError, match="the environment variable NO_KEY"):
        check_tokens(Recipe.model_validate({**MINIMAL, "stages": [there]}))
    check_tokens(Recipe.model_validate(MINIMAL))


RECIPE = """\
name: t
model: {path: "tiny://llama"}
stages:
  - name: rl
    kind: ppo
    policy: base
    prompts: {path: prompts.jsonl}
    samples_per_prompt: 2
    steps: 1
    reward: {kind: llm, model: "tiny://llama"}
"""


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "samples_per_prompt: 2", "samples_per_prompt: 1",
            "8:25: stages.rl.samples_per_prompt: a language model as judge compares a prompt's samples: must be at",
        ),
        ("kind: llm, model", "kind: llm, url: 'host/v1', model", "stages.rl.reward.url"),
        ("kind: llm, model", "kind: llm, url: 'http://me:pw@host/v1', model", "stages.rl.reward.url"),
        ('model: "tiny://llama"}\n', "model: ./nowhere}\n", "stages.rl.reward.model: folder not found: ./nowhere"),
        ("kind: llm, model", "kind: llm, critera: x, model", "did you mean criteria"),
        (
            "stages:\n", "roles: {judge: {gpus: 1, tensor_parallel: 2}}\nstages:\n",
            "roles.judge.gpus: tensor_parallel: 2 needs gpus: 2 for each replica, got 1",
        ),
    ],
)  # fmt: skip
def test_recipe_errors(tmp_path, old, new, problem):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    assert RECIPE.count(old) == 1
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace(old, new))
    with pytest.raises(RecipeError, match=re.escape(problem)):
        load_recipe(tmp_path / "recipe.yaml", ())


def test_the_smallest_online_recipe_is_fine(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert "judge" in processes(load_recipe(tmp_path / "recipe.yaml", ()).recipe)
