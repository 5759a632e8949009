"""Every recipe in recipes/ is valid, with the files it names."""

from pathlib import Path

import pytest

from rlhf.recipe.load import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "eval")  # tasks of `rlhf eval`


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(RECIPES)))
def test_it_loads(path):
    assert load_recipe(path).recipe.stages
