import math

import pytest

from rlhf.engines.schedule import lr_scale
from rlhf.recipe.base import Optimizer


def scales(schedule: str, warmup: int, total: int) -> list[float]:
    optimizer = Optimizer(schedule=schedule, warmup_steps=warmup)
    return [lr_scale(optimizer, step, total) for step in range(total)]


def test_linear_falls_to_one_step_above_zero() -> None:
    assert scales("linear", 0, 4) == [1.0, 0.75, 0.5, 0.25]


def test_warmup_climbs_in_equal_steps_and_the_schedule_starts_full_after_it() -> None:
    assert scales("linear", 3, 7) == [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    assert scales("constant", 1, 4) == [0.5, 1.0, 1.0, 1.0]


def test_cosine_is_half_way_down_in_the_middle() -> None:
    root = math.sqrt(0.5)
    assert scales("cosine", 0, 4) == pytest.approx([1.0, (1 + root) / 2, 0.5, (1 - root) / 2])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 5, 10, 20])
@pytest.mark.parametrize("total", [1, 2, 10])
def test_no_step_is_lost_and_none_goes_beyond_the_base_rate(schedule: str, warmup: int, total: int) -> None:
    values = scales(schedule, warmup, total)
    assert all(0 < value <= 1 for value in values)
    assert values[: warmup + 1] == sorted(values[: warmup + 1])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
