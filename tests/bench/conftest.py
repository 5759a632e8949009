"""The tiny model as a recipe asks for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from rlhf.bench.setting import OWN_STAGES, Setting
from rlhf.recipe.schema import Recipe


@pytest.fixture
def tiny_recipe() -> Callable[..., Recipe]:
    """Makes recipes of the tiny model in float32."""

    def make(**more: Any) -> Recipe:
        stage = {"name": "sft", "kind": "sft", **OWN_STAGES["sft"]}
        keys = {"name": "tiny", "model": {"path": "tiny://llama", "dtype": "float32"}, "tuning": {"kind": "full"}}
        return Recipe.model_validate({**keys, "stages": [stage], **more})

    return make


@pytest.fixture
def tiny_setting(tiny_recipe: Callable[..., Recipe]) -> Setting:
    """All weights of the tiny model trained, with little time for each measurement."""
    return replace(Setting.of(tiny_recipe(), seconds=0.01), cores=1)
