"""`seeds`: which stages branch, what they read from, and what is refused."""

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.duration import estimate_seconds
from rlhf.recipe.plan import headline, make_plan
from rlhf.recipe.resources import Resources
from rlhf.recipe.seeds import expand_seeds, method
from tests.recipe.conftest import TEXT
from tests.recipe.test_recipe_duration import SHAPE

SEEDS = TEXT.replace("stages:\n", "seeds: [4, 9]\nstages:\n", 1)


def test_methods_branch_and_what_comes_before_runs_once(folder):
    expanded = expand_seeds(folder.load(SEEDS).recipe)
    assert [stage.name for stage in expanded.stages] == [
        "sft", "pairs", "rm", "ppo@4", "ppo@9", "dpo@4", "dpo@9", "duel",
    ]  # fmt: skip
    duel = expanded.stages[-1]
    assert duel.candidates == ["sft", "ppo@4", "ppo@9", "dpo@4", "dpo@9"]
    assert [stage.seed for stage in expanded.stages[3:7]] == [4, 9, 4, 9]
    assert {stage.policy for stage in expanded.stages[3:7]} == {"sft"}
    assert [method(name) for name in duel.candidates] == ["sft", "ppo", "ppo", "dpo", "dpo"]


def test_what_follows_a_branch_follows_it_under_the_same_seed(folder):
    more = """\
  - name: again
    kind: annotate
    policy: dpo
    prompts: {path: data/prompts.jsonl}
    judge: {kind: function, path: "rewards.py:score"}
  - {name: dpo2, kind: dpo, policy: dpo, data: {stage: again}}
  - name: duel
"""
    expanded = expand_seeds(folder.load(SEEDS.replace("  - name: duel\n", more)).recipe)
    stages = {stage.name: stage for stage in expanded.stages}
    assert stages["again@9"].policy == "dpo@9"
    assert stages["dpo2@9"].policy == "dpo@9"
    assert stages["dpo2@9"].data.stage == "again@9"
    assert stages["dpo2@4"].data.stage == "again@4"


def test_without_seeds_nothing_changes(folder):
    recipe = folder.load().recipe
    assert expand_seeds(recipe) is recipe


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[4, 9]", "[4, 4]", "3:12: seeds[1]: 4 is there twice"),
        ("[4, 9]", "[-1]", "3:9: seeds[0]: must be from 0 to 2147483647, got -1"),
        ("baseline: sft", "baseline: dpo", "stages.duel.baseline: 'dpo' runs once per seed"),
        ("name: dpo", "name: dpo@4", "stages.dpo@4.name: "),
    ],
)
def test_refusals(folder, old, new, expected):
    with pytest.raises(RecipeError) as caught:
        folder.load(SEEDS.replace(old, new, 1))
    assert expected in str(caught.value)


def test_the_plan_names_a_method_once(folder):
    plan = make_plan(folder.load(SEEDS), Resources(cpus=2, gpus=0, memory_bytes=2**34))
    assert "rm (reward) -> ppo x 2 seeds -> dpo x 2 seeds -> duel (compare);" in headline(plan)
    assert [stage.name for stage in plan.stages].count("ppo@9") == 1


def test_a_budget_bounds_the_estimated_duration(folder):
    free = folder.load(SEEDS.replace("steps: 3", "steps: 3000")).recipe
    bound = folder.load(SEEDS.replace("steps: 3", "steps: 3000"), "budget={gradient_tokens: 10000}").recipe
    assert estimate_seconds(bound, SHAPE, 1e6, {}) < 0.1 * estimate_seconds(free, SHAPE, 1e6, {})
